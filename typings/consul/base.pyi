# What lbagent uses of py-consul.

from collections.abc import Mapping
from typing import NamedTuple

class Response(NamedTuple):
    code: int
    headers: Mapping[str, str]
    body: str
