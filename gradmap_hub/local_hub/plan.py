"""What requires a paid plan on the Hub."""

from .context import Hub
from .errors import HubError
from .names import RepoKey
from .store import SpaceSettings

#: The hardware that a Space can request.
SPACE_HARDWARE = (
    "cpu-basic",
    "cpu-upgrade",
    "cpu-xl",
    "zero-a10g",
    "t4-small",
    "t4-medium",
    "l4x1",
    "l4x4",
    "l40sx1",
    "l40sx4",
    "l40sx8",
    "a10g-small",
    "a10g-large",
    "a10g-largex2",
    "a10g-largex4",
    "a100-large",
    "h100",
    "h100x8",
)

#: The real Hub's message, as of July 2026.
_NEEDS_PRO = (
    "Static Spaces are free for everyone, but hosting Gradio and Docker Spaces on free cpu-basic requires a PRO"
    " subscription. Subscribe at https://huggingface.co/pro"
)
#: The number of Gradio Spaces on ZeroGPU that a free account may host, once it is older than 30 days.
_FREE_ZERO_GPU_SPACES = 2
_ZERO_GPU = "zero-a10g"


def check_plan(hub: Hub, key: RepoKey, space: SpaceSettings) -> None:
    """Check that the owner's plan allows a Space with these settings.

    Raises:
        HubError: 402, the Space requires a paid plan.
    """
    plan = hub.plan_of(key.namespace)
    if plan in ("pro", "team") or space.sdk == "static":
        return
    if space.sdk != "gradio" or space.hardware != _ZERO_GPU:
        raise HubError(402, _NEEDS_PRO)
    if plan == "free":
        others = [other for other in hub.store.keys("space") if other.namespace == key.namespace and other != key]
        settings = [hub.store.state(other).space for other in others]
        if sum(each is not None and each.hardware == _ZERO_GPU for each in settings) < _FREE_ZERO_GPU_SPACES:
            return
    raise HubError(
        402,
        f"Payment required: a free account may host {_FREE_ZERO_GPU_SPACES} Gradio Spaces on {_ZERO_GPU}, once its"
        " e-mail address is verified and it is older than 30 days.",
    )
