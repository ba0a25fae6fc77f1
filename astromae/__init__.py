"""Photometric redshifts of galaxies from images, by masked autoencoding (AstroMAE)."""
import warnings

__version__ = "0.1.0"

# fastai decorates two functions with torch.jit.script when it is imported, which torch calls outdated
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
