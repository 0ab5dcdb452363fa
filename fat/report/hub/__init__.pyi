from .upload import push_to_hub as push_to_hub
from .upload import save_for_hub as save_for_hub
