from .base import ImageSource as ImageSource
from .base import PhotoSource as PhotoSource
from .folder import FolderSource as FolderSource
from .manifest import ImageIndex as ImageIndex
