"""An embedded Hugging Face Hub for rehearsals, air-gapped machines and tests.

The only client it is built for is the real ``huggingface_hub``. Nothing here imports the rest of
``gradmap_hub``, so it can be started without torch or transformers.

>>> from pathlib import Path
>>> from gradmap_hub.local_hub import LocalHub
>>> with LocalHub(Path("hub-data")) as hub:
...     token = hub.add_user("ada")
...     HfApi(endpoint=hub.url, token=token).create_repo("ada/tiny")

Set ``HF_ENDPOINT`` to ``hub.url`` before ``huggingface_hub`` is imported. ``endpoint=`` alone is not
enough in 0.36.2: commit addresses are parsed against the global endpoint, so ``create_commit`` (and all
uploads) raise ``ValueError`` after the commit has landed. In a process that has imported it already, both
``huggingface_hub.constants.ENDPOINT`` and ``huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE``
must be replaced; with only the first, downloads go to huggingface.co, token included.

For tests of what goes wrong, arm a fault before the client asks, and read the log afterwards:

>>> hub.faults.add(Fault("commit", "reset-after"))  # the commit lands, its answer does not
>>> [request.status for request in hub.requests if request.route == "commit"]
"""

from .faults import ANY, ROUTES, Fault, Faults
from .requestlog import Request
from .server import LocalHub

__all__ = ["ANY", "ROUTES", "Fault", "Faults", "LocalHub", "Request"]
