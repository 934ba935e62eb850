"""Every error that jaxinfer raises on purpose. All derive from `JaxinferError`."""

from __future__ import annotations


class JaxinferError(Exception):
    """Base class: catch this to catch whatever jaxinfer refuses."""


class InvalidRequest(JaxinferError, ValueError):  # noqa: N818
    """A request that cannot be served as asked. Raised before any work is done.

    Attributes:
        index: position of the request in the list given by the caller.
        field: the argument or sampling parameter that is wrong, such as `"temperature"`.
    """

    def __init__(self, message: str, *, index: int = 0, field: str = "prompt") -> None:
        super().__init__(f"request {index}, {field}: {message}")
        self.index = index
        self.field = field
        self.message = message


class FunctionFault(JaxinferError):  # noqa: N818
    """A function that came with a request made NaN, infinity or something huge. It ends that
    request.

    Attributes:
        index: position of the request in the list given by the caller.
        request_id: of the request.
        site: where; `logits` for what no token can be sampled from.
    """

    def __init__(self, site: str, *, index: int, request_id: str) -> None:
        super().__init__(f"request {index}, {site}: its own function made NaN or infinity")
        self.site = site
        self.index = index
        self.request_id = request_id


class UnsupportedModel(JaxinferError):  # noqa: N818
    """The model's architecture or a field of its config is not one that jaxinfer computes."""


class CheckpointError(JaxinferError):
    """Weights that are missing, extra, mis-shaped, truncated or unreadable."""


class CapacityError(JaxinferError):
    """The model, or a request, needs more memory than there is."""


class QueueFull(JaxinferError):  # noqa: N818 (public API, like the other refusals)
    """The bounded queue refuses another request; the message says how many wait."""
