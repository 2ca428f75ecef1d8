"""Sentences for clients, which say nothing of where things are on this machine."""

import re
from collections.abc import Mapping
from pathlib import Path

# An absolute path: in quotes up to the end of them, else up to a blank or a mark. Not the path of a URL.
_PATH = re.compile(r"""(?<=['"`])/[^'"`\n]+(?=['"`])|(?<![\w:/.~-])/[^\s'"`,;:()\[\]<>]+""")


def without_paths(sentence: str, folders: Mapping[str, Path]) -> str:
    """Return the sentence with the key of a folder in place of its path, and of other absolute paths the last part."""
    for key, folder in sorted(folders.items(), key=lambda item: -len(str(item[1]))):  # one may be in another
        sentence = sentence.replace(f"{folder}/", f"{key}/")
    return _PATH.sub(lambda found: found[0].rstrip("/.").rpartition("/")[2], sentence)
