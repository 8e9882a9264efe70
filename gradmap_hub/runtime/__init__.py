"""Text generation from a model folder or a Hub repository, on ONNX Runtime and without torch.

from gradmap_hub import runtime

model = runtime.load("me/model-gradmap-25")
answer = model.start(model.encode_chat([{"role": "user", "content": "Hello"}]), max_tokens=64)
for piece in answer:
    print(piece, end="", flush=True)
"""

from gradmap_hub.runtime.artifacts import Artifact, available_artifacts, choose_artifact
from gradmap_hub.runtime.generation import Generation
from gradmap_hub.runtime.loading import load
from gradmap_hub.runtime.sampling import Sampling
from gradmap_hub.runtime.scores import Scoring, TokenScore
from gradmap_hub.runtime.text_model import PromptError, TextModel

__all__ = [
    "Artifact",
    "Generation",
    "PromptError",
    "Sampling",
    "Scoring",
    "TextModel",
    "TokenScore",
    "available_artifacts",
    "choose_artifact",
    "load",
]
