"""Plain data out of JSON and YAML that may be damaged, or a stranger's."""

import functools
import json
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import InstanceOf, TypeAdapter, ValidationError

from uhml.errors import UserError
from uhml.files import regular_file

T = TypeVar("T")

MAX_LETTERS = 200_000
"""Of YAML: a config has a few thousand."""
MAX_ALIASES = 16
"""Each may stand for all that was before: a hundred of them, in 300 letters, for more than there is memory."""


NO_YAML = (OmegaConfBaseException, yaml.YAMLError, RecursionError, ValueError, TypeError, AssertionError)
"""What OmegaConf raises of texts that are no YAML, are nested too deep, or have numbers that are too long."""


class Damaged(UserError):
    """A file of a run that is there, but not as uhml has written it."""


def read_json(path: Path, kind: type[T]) -> T | None:
    """Return what a small file of JSON holds, checked to be of a type; None if there is no such file.

    Args:
        path: the file.
        kind: any type that pydantic can check, such as a dataclass, with all that it is of.

    Raises:
        Damaged: it cannot be read, or is no JSON, or of another form.
    """
    try:
        with open(path, "rb", opener=regular_file) as file:
            return _adapter(kind).validate_python(json.load(file))  # type: ignore[arg-type]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise Damaged(f"{path} cannot be read: {e.strerror or e}.") from e
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Damaged(f"{path} is damaged: {where and f'{where}: '}{first['msg']}.") from e
    except (ValueError, RecursionError) as e:
        raise Damaged(f"{path} is damaged: {e}.") from e


_adapter = functools.cache(TypeAdapter)

Text = InstanceOf[str]
"""A text that may have names of files in it, which need not be of UTF-8."""


def parse_yaml(text: object, said: str) -> DictConfig | ListConfig:
    """Return what YAML says, in OmegaConf's terms, without looking up a ``${key}`` in it.

    Args:
        text: the YAML.
        said: what the user knows it by, such as the name of its file.

    Raises:
        UserError: it is none, or would be very large.
    """
    if not isinstance(text, str):
        raise UserError(f"{said} is no YAML: it is no text.")
    if len(text) > MAX_LETTERS:
        raise UserError(f"{said} is no config: it has {len(text):,} letters.")
    try:
        if sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)) > MAX_ALIASES:
            raise UserError(f"{said}: more than {MAX_ALIASES} aliases (*name) are not followed: write them out.")
        found = OmegaConf.create(text)
    except NO_YAML as e:
        raise UserError(f"{said} is no YAML: {' '.join(str(e).split())[:300]}") from e
    return found
