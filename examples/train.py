"""Trains a small FasterNet from scratch on scikit-learn's handwritten digits.

    python examples/train.py                          # fused; --backend eager for plain PyTorch
    python examples/train.py --plot digits.png        # both, and their losses on top of each other
    torchrun --nproc-per-node 2 examples/train.py     # several processes on one node
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \
        examples/train.py                             # several nodes: the same on each

Needs the packages of the extra [examples]. The first process writes losses.csv: backend, step,
loss.
"""

import argparse
import csv
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm

import fasternet_kernels as fk

BACKENDS = ("eager", "fused")
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, default="fused")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64, help="over all processes")
    parser.add_argument("--lr", type=float, default=0.004)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--losses", default="losses.csv", metavar="FILE")
    parser.add_argument(
        "--plot", metavar="FILE", help="train with both backends, draw their losses"
    )
    return parser.parse_args()


def digits():
    """1437 digits to train with and 360 held out, of 8x8 pixels, enlarged to 32x32."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=32, mode="bilinear")
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [TensorDataset(images[part], labels[part]) for part in (order[360:], order[:360])]


def augment(images):
    """Each image moved, turned and stretched a little, at random."""
    change = torch.eye(2, 3) + 0.1 * torch.randn(len(images), 2, 3)
    grid = F.affine_grid(change.to(images.device), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def make_model(backend, device):
    model = fk.models.FasterNet(
        in_channels=1, num_classes=10, embed_dim=32, depths=(1, 2), feature_dim=128, act="gelu"
    )
    if backend == "fused":
        fk.accelerate(model)
    return model.to(device, memory_format=torch.channels_last)


def train(backend, args, device):
    """Returns (the loss of every step, the share of held-out digits that are recognised)."""
    torch.manual_seed(args.seed)
    training, held_out = digits()
    model = net = make_model(backend, device)
    if PROCESSES > 1:
        model = DistributedDataParallel(net)  # with the weights of the first process
    torch.manual_seed(args.seed + RANK)
    sampler = DistributedSampler(training, PROCESSES, RANK, seed=args.seed)
    loader = DataLoader(training, args.batch // PROCESSES, sampler=sampler, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    steps = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)

    losses = []
    bar = tqdm(total=steps, desc=backend, unit="step", disable=RANK > 0)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            loss = F.cross_entropy(model(augment(images.to(device))), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    bar.close()

    losses = torch.stack(losses)
    if PROCESSES > 1:
        dist.all_reduce(losses)
    images, labels = (t.to(device) for t in held_out.tensors)
    with torch.inference_mode():
        right = net.eval()(images).argmax(1) == labels
    return (losses / PROCESSES).tolist(), right.float().mean().item()


def plot(curves, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (backend, losses), (colour, width) in zip(
        curves.items(), (("#E69F00", 4.0), ("#0072B2", 1.2))
    ):
        axes.plot(losses, label=backend, color=colour, linewidth=width)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="FasterNet on handwritten digits")
    axes.legend()
    fig.savefig(path, dpi=150)


def main():
    args = parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if PROCESSES > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    curves = {}
    for backend in BACKENDS if args.plot else (args.backend,):
        curves[backend], accuracy = train(backend, args, device)
        if RANK == 0:
            print(f"{backend}: {accuracy:.1%} of the held-out digits are recognised")
    if RANK == 0:
        with open(args.losses, "w", newline="") as file:
            rows = [(b, i, loss) for b, losses in curves.items() for i, loss in enumerate(losses)]
            csv.writer(file).writerows([("backend", "step", "loss"), *rows])
        if args.plot:
            plot(curves, args.plot)
    if PROCESSES > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
