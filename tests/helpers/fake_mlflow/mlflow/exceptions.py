class MlflowException(Exception):  # noqa: N818 - its name
    pass
