"""Pictures of a running engine (pygame): ``Viewer`` draws a frame, ``History`` keeps what it shows over time."""

from llmsched_env.render.history import History
from llmsched_env.render.names import Names
from llmsched_env.render.viewer import SIZE, Viewer

__all__ = ["SIZE", "History", "Names", "Viewer"]
