"""The Hugging Face hub: its cache on this disk, whether it can be reached, and downloads from it.

The cache is read by its documented layout, so a model that is there costs no import of the hub's
client and no connection.
"""

import errno
import os
import socket
import threading
import urllib.parse
import urllib.request
from pathlib import Path

PROBE_SECONDS = 2.0

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE")


def is_offline() -> bool:
    """Tell whether the environment asks for no network (HF_HUB_OFFLINE and its relatives)."""
    return any(
        os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE")
        for name in _OFFLINE_VARIABLES
    )


def hub_cache_folder() -> Path:
    """Return where the hub's client keeps its downloads, by its own environment variables."""
    explicit = os.environ.get("HF_HUB_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    cache_home = os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    home = os.environ.get("HF_HOME", os.path.join(cache_home, "huggingface"))
    return Path(home).expanduser() / "hub"


def cached_snapshot(hub_id: str, revision: str | None) -> Path | None:
    """Return the snapshot folder of the hub's cache; its layout is documented and stable."""
    repository = hub_cache_folder() / f"models--{hub_id.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    if commit is None or not (repository / "snapshots" / commit).is_dir():
        return None
    return repository / "snapshots" / commit


def why_no_download(allow_download: bool) -> str | None:
    """Return why no download can be tried, within `PROBE_SECONDS`; None when one can."""
    if not allow_download:
        return "downloads were not asked for"
    if is_offline():
        return "the environment says to stay offline (HF_HUB_OFFLINE)"
    return unreachable(_hub_endpoint())


def unreachable(address: str) -> str | None:
    """Try to reach a server, or the proxy before it, for `PROBE_SECONDS`; None when it answers.

    Args:
        address: of the form ``https://host[:port]``.
    """
    target = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = target.port or (80 if target.scheme == "http" else 443)
    reached = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((target.hostname, port), timeout=PROBE_SECONDS).close()
            reached.set()
        except OSError:
            pass

    # Looking a name up cannot be given a time limit, so it happens beside the caller.
    probe = threading.Thread(target=connect, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS + 0.5)
    return None if reached.is_set() else f"{target.hostname} cannot be reached from this machine"


def download(hub_id: str, revision: str | None, patterns: list[str]) -> str | None:
    """Download files into the hub's cache; return why that failed, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=patterns,
            cache_dir=hub_cache_folder(),
            endpoint=_hub_endpoint(),
            etag_timeout=3,
        )
    except GatedRepoError:
        return "its licence must first be accepted on the hub, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        return "the hub has no such public repository"
    except RevisionNotFoundError:
        return f"the repository has no revision '{revision}'"
    except Exception as error:
        # Whatever breaks below the client, disk, transport or server, ends in the same sentence;
        # the client wraps an answer of the server in errors of its own.
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if isinstance(answer, HfHubHTTPError):
            return f"the hub answered with the error {answer.response.status_code}"
        return _disk_problem(error) or f"the download broke off ({type(error).__name__})"
    return None


def _disk_problem(error: BaseException | None) -> str | None:
    """Tell of a full or read-only disk, wherever in the chain of causes it stands."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return f"the disk of {hub_cache_folder()} is full"
        if isinstance(error, OSError) and error.errno in _FORBIDDEN:
            return f"{hub_cache_folder()} cannot be written ({error.strerror})"
        error = error.__cause__ or error.__context__
    return None


def _hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
