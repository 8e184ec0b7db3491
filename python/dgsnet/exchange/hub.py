"""Weights from the Hugging Face Hub: which file, at which commit, under which licence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgsnet.errors import UserError
from dgsnet.files import one_line

PREFIX = "hf:"
ADDRESS = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# Licences by the Hub's names that permit commercial use. All others are asked for.
COMMERCIAL = {
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "unlicense"),
    *("cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    *("mpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0"),
}


@dataclass(frozen=True)
class Download:
    """A file of weights and where it is from.

    Attributes:
        path: on this machine.
        name: the file's name, or hf:OWNER/NAME/FILE.
        revision: the commit; empty for a file that was not downloaded.
        licence: as its repository names it; empty where it names none.
    """

    path: Path
    name: str
    revision: str = ""
    licence: str = ""


def download(address: str, accept_licence: bool) -> Download:
    """Fetch a file of weights, of the one commit that the revision means now.

    Args:
        address: hf:OWNER/NAME, with @REVISION or /FILE or both behind it.
        accept_licence: whether a licence may forbid commercial use, be unknown here or be missing.

    Raises:
        UserError: no such address, repository or file; several files; no network; a licence not accepted.
    """
    import huggingface_hub

    found = ADDRESS.fullmatch(address)
    if not found or ".." in address:
        raise UserError(
            f"{address} is no address: give hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME/FILE"
        )
    repository, revision, file = found.groups()
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision)
        file = file or _only(address, [sibling.rfilename for sibling in info.siblings or ()])
        licence = _licence(info)
        if licence not in COMMERCIAL and not accept_licence:
            named = f"is under {licence}, which" if licence else "names no licence, which"
            raise UserError(
                f"{PREFIX}{repository} {named} is not known to permit commercial use: read its terms, and "
                "give --accept-licence if yours is a use that they permit"
            )
        path = huggingface_hub.hf_hub_download(repository, file, revision=info.sha)
    except UserError:
        raise
    except Exception as error:
        # It may be the hub's, the proxy's or the socket's.
        raise UserError(
            f"cannot download {address} ({one_line(error, 200)}): check the name and the network, or fetch "
            "the file elsewhere and give its path"
        ) from None
    return Download(Path(path), f"{PREFIX}{repository}/{file}", info.sha or "", licence)


def _only(address: str, names: list[str]) -> str:
    """The one file of weights; where it is there in several forms, safetensors."""
    weights = [name for name in names if name.endswith(SUFFIXES)]
    preferred = [name for name in weights if name.endswith(SUFFIXES[0])] or weights
    if len(preferred) != 1:
        listed = f": {', '.join(sorted(weights)[:10])}" if weights else ""
        raise UserError(
            f"{address} holds {len(weights)} files of weights{listed}; name one, as {address}/FILE"
        )
    return preferred[0]


def _licence(info: Any) -> str:
    """As the repository's card names it, in small letters; empty where it does not."""
    named = (info.card_data or {}).get("license") or ""
    return " ".join([named] if isinstance(named, str) else map(str, named)).lower()
