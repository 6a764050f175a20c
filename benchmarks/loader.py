"""Images a second of opentrans' loader beside a plain torchvision pipeline on the same files.

    python benchmarks/loader.py [--n 64] [--workers 2] [--size 512]

Both read 640x480 JPEG images and label maps, scale them by large-scale jitter, crop to `size`, flip and make
batches of 8.
Mask classification trains on a mask for each class beside the labels (`regions`), pixel classification on labels
alone. So each runs twice: with the masks, and with
the labels alone. Ours also checks the labels. All take turns, `--rounds` times; the best of each counts. CPU
seconds, which a busy machine disturbs less, are those of one process without workers.
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
        Image.fromarray(rng.integers(0, 12, (6, 8), np.uint8).repeat(80, 0).repeat(80, 1)).save(
            root/f'labels/{i:04d}.png')

class Plain(Dataset):
    "What one would write with torchvision."
    def __init__(self, root, size, masks):
        self.masks = masks
        self.images,self.labels = (sorted((root/k).iterdir()) for k in ('images', 'labels'))
        self.transform = v2.Compose([v2.ScaleJitter((size, size), scale_range=(.1, 2.)),
                                     v2.RandomCrop(size, pad_if_needed=True,
                                                   fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}),
                                     v2.RandomHorizontalFlip(),
                                     v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64},
                                                scale=True)])
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        image = tv_tensors.Image(Image.open(self.images[i]).convert('RGB'))
        labels = torch.from_numpy(np.array(Image.open(self.labels[i])))[None]
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
    for name,value in (('n', 64), ('workers', 2), ('size', 512), ('rounds', 3)):
        p.add_argument(f'--{name}', type=int, default=value)
    a = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        write(Path(d), a.n)
        folder = open_dataset('folder', d, names=[f'class {i}' for i in range(12)])
        runs = {(who, what): pair for what,masks in (('masks', True), ('labels', False))
                for who,pair in (('opentrans', (Augmented(folder, a.size, regions=masks), collate)),
                                 ('torchvision', (Plain(Path(d), a.size, masks), pad_collate)))}
        best,cpu = {k: 0. for k in runs},{k: float('inf') for k in runs}
        for _ in range(a.rounds):
            for k,(data,f) in runs.items():
                best[k] = max(best[k], rate(data, a.n, a.workers, f))
                start = time.process_time()
                [data[i] for i in range(a.n)]
                cpu[k] = min(cpu[k], time.process_time()-start)
    print(f'{a.workers} workers, crop {a.size}, {a.n} images')
    for what in ('masks', 'labels'):
        for who in ('opentrans', 'torchvision'):
            print(
                f'  {who:12} {what:7}{best[who, what]:7.1f} images a second {1000*cpu[who, what]/a.n:7.2f} CPU ms '
                f'an image')
        print(
            f'  {what}: opentrans is {best["opentrans", what]/best["torchvision", what]:.2f} times as fast, '
            f'{cpu["torchvision", what]/cpu["opentrans", what]:.2f} times by CPU time')
