"""The configuration of a run: every key, its default and its constraint. Imports no torch.

A run is described by one YAML file (see `launch/configs/`). Wrong values end in one `ConfigError` whose
message names the key, what was given and what is valid; reading files is in `lhcp.config_file`.
"""

from lhcp.config.lighthouse import LighthouseConfig, legal_num_strata
from lhcp.config.model import LinearRopeScaling, Llama3RopeScaling, ModelConfig, RopeScaling
from lhcp.config.parallel import BlockBackendName, ExchangeName, ParallelConfig, Sharding
from lhcp.config.run import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    EvalMode,
    MemoryConfig,
    OptimConfig,
    ProfileConfig,
    RecomputeMode,
    RunConfig,
    StageConfig,
    StageMode,
)
from lhcp.config.section import ConfigError, PositiveInt, Section, written_out

__all__ = [
    "BlockBackendName", "CheckpointConfig", "ConfigError", "DataConfig", "EvalConfig", "EvalMode", "ExchangeName",
    "LighthouseConfig", "LinearRopeScaling", "Llama3RopeScaling", "MemoryConfig", "ModelConfig", "OptimConfig",
    "ParallelConfig", "PositiveInt", "ProfileConfig", "RecomputeMode", "RopeScaling", "RunConfig", "Section",
    "Sharding", "StageConfig", "StageMode", "legal_num_strata", "written_out",
]  # fmt: skip
