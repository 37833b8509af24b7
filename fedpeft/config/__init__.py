"""The config of a run: `schema` has its sections, `loading` fills them, `checks` refuses, `values` reads texts.

What methods and programs need of it is named here.
"""

from fedpeft.config.checks import check
from fedpeft.config.loading import (
    build,
    complete,
    from_yaml,
    job_configs,
    load,
    method,
    read,
    read_options,
    read_yaml,
    shipped_configs,
    to_tree,
    to_yaml,
)
from fedpeft.config.materials import AdapterConfig, DataConfig, ModelConfig, PartitionConfig
from fedpeft.config.option import FEDERATION, LEARNER, option
from fedpeft.config.overrides import parse_overrides
from fedpeft.config.protection import PrivacyConfig, SecAggConfig
from fedpeft.config.schema import (
    ClientConfig,
    Config,
    Configured,
    ContinualConfig,
    EvaluationConfig,
    GenerateConfig,
    RunConfig,
    StrategyConfig,
    TTAConfig,
    default_of,
    options_of,
)

__all__ = [
    "FEDERATION",
    "LEARNER",
    "AdapterConfig",
    "ClientConfig",
    "Config",
    "Configured",
    "ContinualConfig",
    "DataConfig",
    "EvaluationConfig",
    "GenerateConfig",
    "ModelConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "RunConfig",
    "SecAggConfig",
    "StrategyConfig",
    "TTAConfig",
    "build",
    "check",
    "complete",
    "default_of",
    "from_yaml",
    "job_configs",
    "load",
    "method",
    "option",
    "options_of",
    "parse_overrides",
    "read",
    "read_options",
    "read_yaml",
    "shipped_configs",
    "to_tree",
    "to_yaml",
]
