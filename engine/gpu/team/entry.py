"""The entry of a follower's process. Importing this module brings in no torch: `prepare` sets what torch reads."""

import os
from multiprocessing.connection import Connection

from engine.gpu.process import VISIBLE, Rank, prepare
from engine.job import EngineConfig


def follow(connection: Connection, rank: Rank, config: EngineConfig, visible: str | None) -> None:
    """The whole life of a follower; `visible` are the cards that the lead could see before it chose its own."""
    os.environ.pop(VISIBLE, None)
    if visible is not None:
        os.environ[VISIBLE] = visible
    prepare(config, rank.device)
    from engine.gpu.team.follower import Follower  # not before: it imports torch

    Follower(connection, rank, config).serve()
