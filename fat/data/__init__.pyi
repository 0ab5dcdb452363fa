from .datamodule import FatDataModule as FatDataModule
from .dataset import Batch as Batch
from .dataset import ImageDataset as ImageDataset
from .dataset import ImageLoader as ImageLoader
from .transforms import EvalTransform as EvalTransform
from .transforms import RandomCropTransform as RandomCropTransform
