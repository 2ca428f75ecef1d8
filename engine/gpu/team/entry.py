"""The entry of a follower's process. Importing this module brings in no torch: `prepare` sets what torch reads."""

from multiprocessing.connection import Connection

from engine.gpu.process import Rank, prepare
from engine.job import EngineConfig


def follow(connection: Connection, rank: Rank, config: EngineConfig, visible: str | None) -> None:
    """The whole life of a follower; `visible` are the cards that the lead could see before it chose its own."""
    prepare(config, rank.device, visible)
    from engine.gpu.team.follower import Follower  # not before: it imports torch

    Follower(connection, rank, config).serve()
