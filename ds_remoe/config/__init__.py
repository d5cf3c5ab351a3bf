"""A run's configuration: its schema, how it is read, and every check before a process group is made."""

from ds_remoe.config.batch import BatchSizes
from ds_remoe.config.load import RunConfig, load_run, load_run_or_exit
from ds_remoe.config.problems import ConfigError, ConfigProblem
from ds_remoe.config.schema import ReMoEConfig

__all__ = ["BatchSizes", "ConfigError", "ConfigProblem", "ReMoEConfig", "RunConfig", "load_run", "load_run_or_exit"]
