"""Named routes, for the request log and fault injection."""

from dataclasses import dataclass

from starlette.middleware import Middleware
from starlette.routing import Route

from .context import AsyncHandler, Endpoint, Handler, Hub, endpoint, streaming_endpoint
from .faults import ROUTES, FaultPoint
from .names import RepoType


@dataclass(frozen=True)
class RouteMaker:
    """Creates the routes of one repository type, or those that do not depend on the type.

    GET routes also serve HEAD unless an earlier route handles HEAD. Every method raises ValueError if the name is not
    in :data:`~gradmap_hub.local_hub.faults.ROUTES`.
    """

    hub: Hub
    repo_type: RepoType = "model"

    def route(self, name: str, path: str, handler: Handler, method: str = "GET") -> Route:
        return self._named(name, path, endpoint(self.hub, handler, self.repo_type), method)

    def streaming_route(self, name: str, path: str, handler: AsyncHandler, method: str = "GET") -> Route:
        """A route whose handler streams the body itself."""
        return self._named(name, path, streaming_endpoint(self.hub, handler, self.repo_type), method)

    def signed_route(self, name: str, path: str, handler: Handler, method: str = "GET") -> Route:
        """A route for signed URLs; a request with a token is refused."""
        return self._named(name, path, endpoint(self.hub, handler, self.repo_type, signed=True), method)

    def signed_streaming_route(self, name: str, path: str, handler: AsyncHandler, method: str = "GET") -> Route:
        return self._named(name, path, streaming_endpoint(self.hub, handler, self.repo_type, signed=True), method)

    def storage_route(self, name: str, path: str, handler: Handler, method: str = "GET") -> Route:
        """A route of storage that has its own tokens; the handler checks them."""
        return self._named(name, path, endpoint(self.hub, handler, self.repo_type, own_tokens=True), method)

    def storage_streaming_route(self, name: str, path: str, handler: AsyncHandler, method: str = "GET") -> Route:
        return self._named(name, path, streaming_endpoint(self.hub, handler, self.repo_type, own_tokens=True), method)

    def _named(self, name: str, path: str, target: Endpoint, method: str) -> Route:
        if name not in ROUTES:
            raise ValueError(f"{name!r} is not in ROUTES")
        point = Middleware(FaultPoint, faults=self.hub.faults, route=name)
        return Route(path, target, methods=[method], name=name, middleware=[point])
