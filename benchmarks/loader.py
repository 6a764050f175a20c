"""Images a second of opentrans' loader beside a plain torchvision pipeline on the same files.

    python benchmarks/loader.py [--n 64] [--workers 2] [--size 512]

Both read 640x480 JPEG images and label maps, scale them by large-scale jitter, crop to `size`, flip and make batches of 8.
The torchvision pipeline has no regions, no check of the labels and no vocabulary. The two take turns, three times; the best of each counts.
"""
import argparse, tempfile, time
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from opentrans.data import View, augment, collate, open_dataset, stuff_image

def write(root, n):
    for kind in ('images', 'labels'): (root/kind).mkdir()
    for i in range(n):
        rng = np.random.default_rng(i)
        picture = np.stack([stuff_image(rng, 640, s) for s in ('grass', 'sand')]).mean(0)[:480].astype(np.uint8)
        Image.fromarray(picture).save(root/f'images/{i:04d}.jpg', quality=90)
        Image.fromarray(rng.integers(0, 12, (6, 8), np.uint8).repeat(80, 0).repeat(80, 1)).save(root/f'labels/{i:04d}.png')

class Plain(Dataset):
    "What one would write with torchvision."
    def __init__(self, root, size):
        self.images,self.labels = (sorted((root/k).iterdir()) for k in ('images', 'labels'))
        self.transform = v2.Compose([v2.ScaleJitter((size, size), scale_range=(.1, 2.)), v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}),
                                     v2.RandomHorizontalFlip(), v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True)])
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        image,labels = tv_tensors.Image(Image.open(self.images[i]).convert('RGB')),tv_tensors.Mask(np.array(Image.open(self.labels[i]))[None])
        return self.transform(image, labels)

def rate(data, n, workers, collate_fn=None):
    "Images a second over one pass."
    start = time.perf_counter()
    for _ in DataLoader(data, batch_size=8, num_workers=workers, collate_fn=collate_fn): pass
    return n/(time.perf_counter()-start)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name,value in (('n', 64), ('workers', 2), ('size', 512)): p.add_argument(f'--{name}', type=int, default=value)
    a = p.parse_args(); torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        write(Path(d), a.n)
        ours = View(open_dataset('folder', d, names=[f'class {i}' for i in range(12)]), transform=lambda s,i: augment(s, a.size, [0, i]))
        plain = Plain(Path(d), a.size)
        rates = [(rate(ours, a.n, a.workers, collate), rate(plain, a.n, a.workers)) for _ in range(3)]
    best = [max(r) for r in zip(*rates)]
    print(f'opentrans {best[0]:.1f} images/s, torchvision {best[1]:.1f} images/s, ratio {best[0]/best[1]:.2f} ({a.workers} workers, crop {a.size}, {a.n} images)')
