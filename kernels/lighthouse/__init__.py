"""The device code of Lighthouse attention, each kernel beside its specification in `reference`."""
