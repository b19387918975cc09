"""Publishes a page as a static Space of the Hub."""

from __future__ import annotations

from pathlib import Path

from advkd.cache.errors import TrainingError, first_line

MESSAGE = "A student's page"


def publish(folder: Path, repo_id: str) -> str:
    """Upload a page's folder in one commit; the Space is created if missing.

    Returns:
        The Space's address.

    Raises:
        TrainingError: the Hub is unreachable or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        found = api.create_repo(repo_id, repo_type="space", space_sdk="static", exist_ok=True).repo_id
        api.upload_folder(
            repo_id=found, repo_type="space", folder_path=folder, commit_message=MESSAGE, delete_patterns="*"
        )
    except Exception as error:  # huggingface_hub, its HTTP library and the OS each raise their own
        raise TrainingError(f"the Hub did not accept {repo_id} ({first_line(error, 200)})") from error
    return f"https://huggingface.co/spaces/{found}"
