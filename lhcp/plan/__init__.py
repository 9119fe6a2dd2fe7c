"""What a run needs before it is paid for: memory, time, bytes between ranks. Imports no torch."""

from lhcp.plan.gpus import GPUS, Assumption, Gpu, GpuName
from lhcp.plan.report import as_json, show
from lhcp.plan.run import Plan, StagePlan, plan_run

__all__ = ["GPUS", "Assumption", "Gpu", "GpuName", "Plan", "StagePlan", "as_json", "plan_run", "show"]
