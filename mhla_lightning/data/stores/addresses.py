"""Checks of addresses: only plain folders are opened, and secrets are never printed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urlsplit

from mhla_lightning.errors import UserError

ALLOWED = "a local folder, file://, http://, https://, s3:// and gs://"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_PROTOCOLS = ("file", "http", "https", "s3", "gs")
_OBJECTS = ("s3", "gs")  # their keys are plain text, as for the aws and gcloud commands
_KEPT_IN_PATHS = "/%:@!$&'()*+,;=~"  # quote() leaves these; % because the user's own escapes stay as they are


@dataclass(frozen=True)
class Address:
    """A checked address of a folder.

    Args:
        protocol: one of file, http, https, s3, gs.
        parts: the parts of the URL; for s3 and gs the bucket and the plain key, for file only the path of a
            local folder.
    """

    protocol: str
    parts: SplitResult

    def shown(self, name: str = "") -> str:
        """Return the folder, or a file of it, for messages: no user, password, query or fragment."""
        host = self.parts.netloc.rpartition("@")[2]
        return f"{self.protocol}://{host}{_joined(self.parts.path, name)}"

    def requested(self, name: str) -> str:
        """Return the full http(s) URL of a file, percent-encoded.

        It has the folder's own credentials and query, as a signed folder needs them.
        """
        path = _joined(quote(self.parts.path, safe=_KEPT_IN_PATHS), quote(name, safe="/"))
        query = f"?{self.parts.query}" if self.parts.query else ""
        return f"{self.protocol}://{self.parts.netloc}{path}{query}"

    def key(self, name: str) -> str:
        """Return BUCKET/KEY of a file in s3 or gs."""
        return f"{self.parts.netloc}{_joined(self.parts.path, name)}"


def parse(url: str) -> Address:
    """Check and split the address of a folder.

    The key of s3:// and gs:// is taken as it is: blanks, `#`, `?`, `%` and `+` belong to it. In http(s)://
    and file:// such characters are percent-encoded.

    Raises UserError for other protocols, `pipe:` and other commands, chained addresses (`::`), whitespace in
    a url, and `..` in its path.
    """
    if not url.strip() or url != url.strip() or url[0] == "|" or url[-1] == "|" or set(url) & set("\0\n\r\t"):
        raise UserError(repr(url), f"it is no address of a folder; allowed: {ALLOWED}")
    found = _SCHEME.match(url)
    if found is None:
        return Address("file", SplitResult("file", "", url, "", ""))
    protocol = found[1].lower()
    if protocol not in _PROTOCOLS or not found[2]:
        raise UserError(
            _plain(url),
            f"it begins with {found[0]!r}; allowed: {ALLOWED} (for a local folder with a colon in its name, "
            "write ./NAME)",
        )
    if protocol in _OBJECTS:
        return _object(protocol, url, url[found.end() :])
    if "::" in url or re.search(r"\s", url):
        raise UserError(
            _plain(url), "it holds '::' or whitespace; an address is one plain url (write a space as %20)"
        )
    return _checked(protocol, url)


def plain_key_advice(url: str) -> str:
    """Return advice for an address of s3 or gs that was percent-encoded, else nothing."""
    meant = unquote(url)
    if not url.lower().startswith(tuple(f"{name}://" for name in _OBJECTS)) or meant == url:
        return ""
    return f" (a key is taken as it is, also its %: for the folder with the decoded name write '{meant}')"


def check_name(name: str) -> str:
    """Return `name` if it is a plain relative name such as train/index.json.

    Raises UserError for any other name.
    """
    segments = name.split("/")
    if any(part in ("", ".", "..") for part in segments) or set(name) & set("\\:|\0\n\r\t"):
        raise UserError(
            repr(name),
            "it is no plain relative file name: it may not be absolute, climb with '..' or hold any of \\ "
            ": |",
        )
    return name


def _object(protocol: str, url: str, place: str) -> Address:
    """Check BUCKET/KEY of s3 or gs."""
    bucket, slash, key = place.partition("/")
    is_name = bucket.startswith("arn:") or not set(bucket) & set("@:?#%")  # an access point has colons
    if not bucket or not is_name or re.search(r"\s", bucket):
        raise UserError(
            _plain(re.sub(r"//\S*@", "//", url)), f"it is not of the form {protocol}://BUCKET/FOLDER"
        )
    if ".." in unquote(key).replace("\\", "/").split("/"):
        raise UserError(_plain(url), "it climbs with '..'; write the address of the folder itself")
    if "?versionId=" in key:  # s3fs cuts it off
        raise UserError(_plain(url), "it names a version of an object; an address names a folder")
    return Address(protocol, SplitResult(protocol, bucket, f"{slash}{key}", "", ""))


def _checked(protocol: str, url: str) -> Address:
    try:
        parts = urlsplit(url)
        _ = parts.port  # reading it checks it
    except ValueError as error:
        raise UserError(_plain(url), f"it is no valid url ({error})") from error
    if ".." in unquote(parts.path).replace("\\", "/").split("/"):
        raise UserError(_plain(url), "it climbs with '..'; write the address of the folder itself")
    if parts.fragment or (protocol == "file" and parts.query):
        mark, code = ("#", "%23") if parts.fragment else ("?", "%3F")
        raise UserError(
            _plain(url),
            f"it holds '{mark}', which ends the path of a url; in a folder's name write {code}",
        )
    if protocol == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise UserError(_plain(url), "it names no folder of this machine; write file:///ABSOLUTE/FOLDER")
        return Address("file", SplitResult("file", "", unquote(parts.path), "", ""))
    if not parts.netloc.rpartition("@")[2]:
        raise UserError(_plain(url), f"it is not of the form {protocol}://HOST/FOLDER")
    return Address(protocol, parts)


def _joined(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if name else folder.rstrip("/")


def _plain(url: str) -> str:
    """Return a refused address without user, password and query, which may be secrets."""
    return re.sub(r"//[^/@\s]*@", "//", url.split("?")[0])
