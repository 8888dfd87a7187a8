"""What an address may look like: pure checks and splits, so that nothing surprising is ever opened, run or
printed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urlsplit

from mhla_lightning.errors import UserError

ALLOWED = "a local folder, file://, http://, https://, s3:// and gs://"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_PROTOCOLS = ("file", "http", "https", "s3", "gs")
_KEPT_IN_PATHS = "/%:@!$&'()*+,;=~"  # quote() leaves these; % because the user's own escapes stay as they are


@dataclass(frozen=True)
class Address:
    """A checked folder. protocol: one of file, http, https, s3, gs; parts: the url taken apart (for file:
    only its path, a local folder).
    """

    protocol: str
    parts: SplitResult

    def shown(self, name: str = "") -> str:
        """The folder, or a file of it, as messages write it: without user, password, query and fragment."""
        host = self.parts.netloc.rpartition("@")[2]
        return f"{self.protocol}://{host}{_joined(self.parts.path, name)}"

    def requested(self, name: str) -> str:
        """The full http(s) URL of a file, percent-encoded, with the folder's own credentials and query (a
        signed folder).
        """
        path = _joined(quote(self.parts.path, safe=_KEPT_IN_PATHS), quote(name, safe="/"))
        query = f"?{self.parts.query}" if self.parts.query else ""
        return f"{self.protocol}://{self.parts.netloc}{path}{query}"

    def key(self, name: str) -> str:
        """BUCKET/KEY of a file in s3 or gs."""
        return f"{self.parts.netloc}{_joined(self.parts.path, name)}"


def parse(url: str) -> Address:
    """Check a folder's address and take it apart.

    Raises UserError for other protocols, `pipe:` and other commands, chained addresses (`::`), whitespace in
    a url, and `..` in its path.
    """
    if not url.strip() or url != url.strip() or url[0] == "|" or url[-1] == "|" or set(url) & set("\0\n\r\t"):
        raise UserError(f"{url!r} is no address of a folder; allowed: {ALLOWED}")
    found = _SCHEME.match(url)
    if found is None:
        return Address("file", SplitResult("file", "", url, "", ""))
    protocol = found[1].lower()
    if protocol not in _PROTOCOLS or not found[2]:
        raise UserError(
            f"{_plain(url)!r} begins with {found[0]!r}; allowed: {ALLOWED} (a local folder with a "
            "colon in its name: write ./NAME)"
        )
    if "::" in url or re.search(r"\s", url):
        raise UserError(
            f"{_plain(url)!r} holds '::' or whitespace; an address is one plain url (write a space as %20)"
        )
    return _checked(protocol, url)


def check_name(name: str) -> str:
    """Return `name` when it is a plain relative name such as train-000000.tar or train/index.json, else
    raise UserError.
    """
    segments = name.split("/")
    if any(part in ("", ".", "..") for part in segments) or set(name) & set("\\:|\0\n\r\t"):
        raise UserError(
            f"{name!r} is no plain relative file name: it may not be absolute, climb with '..' or "
            "hold any of \\ : |"
        )
    return name


def _checked(protocol: str, url: str) -> Address:
    try:
        parts = urlsplit(url)
        _ = parts.port  # reading it checks it
    except ValueError as error:
        raise UserError(f"{_plain(url)!r} is no valid url ({error})") from error
    if ".." in unquote(parts.path).replace("\\", "/").split("/"):
        raise UserError(f"{_plain(url)!r} climbs with '..'; write the address of the folder itself")
    if protocol == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise UserError(f"{_plain(url)!r} names no folder of this machine; write file:///ABSOLUTE/FOLDER")
        return Address("file", SplitResult("file", "", unquote(parts.path), "", ""))
    if not parts.netloc.rpartition("@")[2] or (
        protocol in ("s3", "gs") and ("@" in parts.netloc or parts.query or parts.fragment)
    ):
        form = "HOST/FOLDER" if protocol.startswith("http") else "BUCKET/FOLDER"
        raise UserError(f"{_plain(url)!r} is not of the form {protocol}://{form}")
    return Address(protocol, parts)


def _joined(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if name else folder.rstrip("/")


def _plain(url: str) -> str:
    """A refused address without user, password and query: those may be secrets."""
    return re.sub(r"//[^/@\s]*@", "//", url.split("?")[0])
