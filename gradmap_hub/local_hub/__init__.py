"""The embedded Hub: a local stand-in for the Hugging Face Hub, for rehearsals, air-gapped machines and tests.

It implements the parts of the Hub's HTTP API that the real client ``huggingface_hub`` uses here. Of the rest of
``gradmap_hub``, it imports only ``files`` and ``machine``, so it starts without torch or transformers.

>>> from pathlib import Path
>>> from gradmap_hub.local_hub import LocalHub
>>> with LocalHub(Path("hub-data")) as hub:
...     token = hub.add_user("ada")
...     HfApi(endpoint=hub.url, token=token).create_repo("ada/tiny")

Set ``HF_ENDPOINT`` to ``hub.url`` before ``huggingface_hub`` is imported. ``endpoint=`` alone is not
enough in 0.36.2: commit URLs are parsed against the global endpoint, so ``create_commit`` (and all
uploads) raise ``ValueError`` after the commit has landed. In a process that has already imported it, replace
both ``huggingface_hub.constants.ENDPOINT`` and ``huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE``:
with only the first, downloads go to huggingface.co and take the token with them.

To test failures, arm a fault before the request and read the log afterwards:

>>> hub.faults.add(Fault("commit", "reset-after"))  # the commit lands, its response is lost
>>> [request.status for request in hub.requests if request.route == "commit"]
"""

from .faults import ANY, ROUTES, Fault, Faults
from .requestlog import Request
from .server import LocalHub

__all__ = ["ANY", "ROUTES", "Fault", "Faults", "LocalHub", "Request"]
