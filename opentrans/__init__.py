"Transferable and principled efficiency for open-vocabulary segmentation: prune CLIP once, transfer the mask, freeze layers by their spectra."
__version__ = '0.1.0'
