"""Routes with a name, which the log tells and faults are put at."""

from dataclasses import dataclass

from starlette.middleware import Middleware
from starlette.routing import Route

from .context import AsyncHandler, Endpoint, Handler, Hub, endpoint, streaming_endpoint
from .faults import ROUTES, FaultPoint
from .names import RepoType


@dataclass(frozen=True)
class RouteMaker:
    """Makes the routes of one kind of repository, or those that have nothing to do with the kind.

    HEAD comes with GET unless a route for HEAD was made before. Every method raises ValueError for a name that
    is not one of :data:`~gradmap_hub.local_hub.faults.ROUTES`.
    """

    hub: Hub
    repo_type: RepoType = "model"

    def route(self, name: str, path: str, handler: Handler, method: str = "GET") -> Route:
        return self._named(name, path, endpoint(self.hub, handler, self.repo_type), method)

    def streaming_route(self, name: str, path: str, handler: AsyncHandler, method: str = "GET") -> Route:
        """For a handler that reads the body itself, piece by piece."""
        return self._named(name, path, streaming_endpoint(self.hub, handler, self.repo_type), method)

    def signed_route(self, name: str, path: str, handler: Handler, method: str = "GET") -> Route:
        """For addresses that are signed, where a token is refused."""
        return self._named(name, path, endpoint(self.hub, handler, self.repo_type, signed=True), method)

    def signed_streaming_route(self, name: str, path: str, handler: AsyncHandler, method: str = "GET") -> Route:
        return self._named(name, path, streaming_endpoint(self.hub, handler, self.repo_type, signed=True), method)

    def storage_route(self, name: str, path: str, handler: Handler, method: str = "GET") -> Route:
        """For storage with tokens of its own, which the handler looks at."""
        return self._named(name, path, endpoint(self.hub, handler, self.repo_type, own_tokens=True), method)

    def storage_streaming_route(self, name: str, path: str, handler: AsyncHandler, method: str = "GET") -> Route:
        return self._named(name, path, streaming_endpoint(self.hub, handler, self.repo_type, own_tokens=True), method)

    def _named(self, name: str, path: str, target: Endpoint, method: str) -> Route:
        if name not in ROUTES:
            raise ValueError(f"{name!r} is not in ROUTES")
        point = Middleware(FaultPoint, faults=self.hub.faults, route=name)
        return Route(path, target, methods=[method], name=name, middleware=[point])
