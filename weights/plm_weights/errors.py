"""What can be wrong with weights. All are ``ValueError``: the caller gave something that cannot be used."""


class CheckpointError(ValueError):
    """A file is torn, foreign or hostile, or does not fit the model. The message names the file and the reason."""


class KeyMapError(CheckpointError):
    """A key map, a checkpoint and a model disagree. The message lists every disagreement."""


class UnknownModelError(CheckpointError):
    """No registry row has this name. The message lists near names."""


class DownloadError(CheckpointError):
    """A file could not be fetched, or what came is not what the registry promises."""
