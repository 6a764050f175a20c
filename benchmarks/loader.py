"""Images a second of opentrans' loader beside a plain torchvision pipeline on the same files.

    python benchmarks/loader.py [--n 64] [--workers 2] [--size 512]

Both read 640x480 JPEG images and label maps, scale them by large-scale jitter, crop to `size`, flip and make batches of 8.
Ours also checks the labels and gives a mask for each class (`regions`), which mask classification trains on. So torchvision runs twice:
with the same masks beside the labels, and with the labels alone. The three take turns, three times; the best of each counts.
"""
import argparse, tempfile, time
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from opentrans.data import Augmented, collate, open_dataset, stuff_image

def write(root, n):
    for kind in ('images', 'labels'): (root/kind).mkdir()
    for i in range(n):
        rng = np.random.default_rng(i)
        picture = np.stack([stuff_image(rng, 640, s) for s in ('grass', 'sand')]).mean(0)[:480].astype(np.uint8)
        Image.fromarray(picture).save(root/f'images/{i:04d}.jpg', quality=90)
        Image.fromarray(rng.integers(0, 12, (6, 8), np.uint8).repeat(80, 0).repeat(80, 1)).save(root/f'labels/{i:04d}.png')

class Plain(Dataset):
    "What one would write with torchvision."
    def __init__(self, root, size, masks):
        self.masks = masks
        self.images,self.labels = (sorted((root/k).iterdir()) for k in ('images', 'labels'))
        self.transform = v2.Compose([v2.ScaleJitter((size, size), scale_range=(.1, 2.)), v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}),
                                     v2.RandomHorizontalFlip(), v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True)])
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        image,labels = tv_tensors.Image(Image.open(self.images[i]).convert('RGB')),torch.from_numpy(np.array(Image.open(self.labels[i])))[None]
        if self.masks: labels = torch.cat([labels]+[labels == c for c in labels.unique()])
        image,labels = self.transform(image, tv_tensors.Mask(labels))
        return image,labels[:1],labels[1:].bool()

def pad_collate(samples):
    images,labels,masks = zip(*samples)
    return torch.stack(images),torch.stack(labels),list(masks)

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
        ours = Augmented(open_dataset('folder', d, names=[f'class {i}' for i in range(12)]), a.size)
        runs = dict(opentrans=(ours, collate), torchvision_masks=(Plain(Path(d), a.size, True), pad_collate), torchvision_labels=(Plain(Path(d), a.size, False), pad_collate))
        best = {k: 0. for k in runs}
        for _ in range(3):
            for k,(data,f) in runs.items(): best[k] = max(best[k], rate(data, a.n, a.workers, f))
    print(f'{a.workers} workers, crop {a.size}, {a.n} images; images a second:')
    for k,r in best.items(): print(f'  {k:20}{r:7.1f}   opentrans is {best["opentrans"]/r:.2f} times as fast')
