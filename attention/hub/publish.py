"""A student's way to the Hub: a file with its model card, shown before anything is sent, then one commit.

The token is the Hub's own login on this machine; it goes to the endpoint only and is no input of any node.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..shown import one_line
from ..students.file import StudentFile, load_student
from ..words import file_size
from .download import is_offline
from .model_card import describe_student, model_card
from .transfer import Hub, HubError, HubFile, without_address

log = logging.getLogger("linearize")
CARD = "README.md"


@dataclass(frozen=True, slots=True, eq=False)
class Publication:
    """What would be uploaded.

    Args:
        file: where it goes.
        path: the student on this machine.
        size: of the student, in bytes.
        card: text of the model card.
        student: what the file holds.
        picture: a JPEG that the card shows; empty for none.
    """

    file: HubFile
    path: Path
    size: int
    card: str
    student: StudentFile
    picture: bytes = b""

    @property
    def picture_name(self) -> str:
        """Where the picture goes, beside the file; empty for none."""
        return f"{self.file.file.removesuffix('.safetensors')}.jpg" if self.picture else ""


def check_repository(repo: str) -> str:
    """Return a repository's name, written or pasted as an address.

    Raises:
        ValueError: it is none.
    """
    return HubFile(without_address(repo), "student.safetensors").repo


def prepare(path: Path, repo: str, picture: bytes = b"") -> Publication:
    """Return what publishing a file would upload; touches no network.

    Args:
        path: of a student.
        repo: "owner/name" on the Hub.
        picture: a JPEG for the card; empty for none.

    Raises:
        ValueError: repository or file name could not be loaded again, or the file is no whole student; one sentence.
    """
    file = HubFile(check_repository(repo), path.name)
    student = load_student(path)
    size = path.stat().st_size
    publication = Publication(file, path, size, "", student, picture)
    return replace(publication, card=model_card(student, file, size, publication.picture_name))


def publish(publication: Publication, *, private: bool, replace_card: bool = False) -> str:
    """Upload a student and its card in one commit, and return the commit's address, with what was left out.

    A repository that is not there is made. The card of one that is there stays, unless it is to be replaced; a picture
    goes only with a card that shows it.

    Args:
        publication: from `prepare`.
        private: whether a new repository is; with it, one that is there and public is refused.
        replace_card: write the card anew where there is one.

    Raises:
        HubError: nobody is logged in, the Hub refuses or cannot be reached; one sentence.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    repo, name = publication.file.repo, publication.file.file
    with contextlib.closing(_hub()) as hub, _explained(repo), _token_stays_home(hub):
        api = HfApi(endpoint=hub.endpoint, token=hub.token, library_name="linearize")
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo)
        if private and not info.private:
            raise HubError(f"{repo} is there and public; switch private off, or make it private on the Hub first")
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(publication.path))]
        writes_card = replace_card or CARD not in {each.rfilename for each in info.siblings or ()}
        if writes_card:
            operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=publication.card.encode()))
        if writes_card and publication.picture:
            operations.append(CommitOperationAdd(publication.picture_name, publication.picture))
        commit = api.create_commit(repo, operations=operations, commit_message=f"Add {name}")
    log.info("published %s: %s", publication.file, one_line(commit.commit_url, 300))
    kept = "; the card that was there stays, without the picture: switch replace_card on to show it"
    return one_line(commit.commit_url, 300) + (kept if publication.picture and not writes_card else "")


def describe_publication(publication: Publication, private: bool, card_path: Path) -> str:
    """Return for people what would be uploaded, then the card."""
    lines = [
        f"to {publication.file.repo}, {'private' if private else 'public'} if it is made now:",
        f"- {publication.file.file}, {file_size(publication.size)}",
        *([f"- {publication.picture_name}, {file_size(len(publication.picture))}"] if publication.picture else []),
        f"- {CARD}, written to {card_path}",
        *describe_student(publication.student),
    ]
    return "\n".join([*lines, "", publication.card])


def _hub() -> Hub:
    """Return the endpoint with the token of this machine.

    Raises:
        HubError: offline by setting, no login, or an endpoint that may not have the token.
    """
    if is_offline():
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be published; unset it and restart ComfyUI")
    hub = Hub()
    if not hub.token:
        hub.close()
        raise HubError(
            f"nobody is logged in at {hub.endpoint}; run hf auth login on this machine, or set HF_TOKEN, with a token"
            " that may write, and restart ComfyUI"
        )
    return hub


@contextlib.contextmanager
def _token_stays_home(hub: Hub) -> Iterator[None]:
    """Keep the client from taking the token to another address that the endpoint names, as it does after uploads."""
    from huggingface_hub.utils import get_session

    def strip(request: Any) -> Any:
        if not hub.is_own(str(request.url)):
            request.headers.pop("Authorization", None)
        return request

    session: Any = get_session()  # of `requests` or of `httpx`; both call `auth` with each request
    before, session.auth = session.auth, strip
    try:
        yield
    finally:
        session.auth = before


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what the Hub and its client raise, whose classes changed between versions, into a sentence."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = one_line(" ".join(str(error).split()), 300) or type(error).__name__
        if status in (401, 403):
            remedy = "log in with a token that may write there (hf auth login)"
        elif status == 404:
            remedy = "check owner and name"
        else:
            remedy = "run again; what is there already is not sent twice"
        raise HubError(f"{repo} could not be published, {remedy}: {reason}") from error
