"""Validation: the loss on held-out samples at fixed σ with fixed noise, so that two steps differ by the model alone."""

import torch
import torch.distributed as dist

from train.base_model.online_encoder import OnlineEncoder
from train.data.batch import Batch, make_batch
from train.data.draws import Draws, sample_generator
from train.data.sample import DataSet
from train.data.shard_dataset import ShardDataset
from train.step.flow_matching_module import FlowMatchingModule

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NOISE_SEED = 0x5EED  # never that of training, the same in every run: losses of different runs are comparable


class Validation:
    """The held-out samples of one data set, spread over the ranks.

    Every rank runs the same number of forward passes (under ZeRO-3 each is a collective): the last ones are repeated
    with weight 0 where the samples do not divide evenly.
    """

    def __init__(self, dataset: DataSet, encoder: OnlineEncoder, rank: int, world: int, device: torch.device):
        self.encoder = encoder
        self.device = device
        self.batches: list[tuple[Batch, bool]] = []
        if isinstance(dataset, ShardDataset):  # a stream holds nothing out
            samples = [int(index) for index in dataset.validation]
            padded = samples + samples[:1] * (-len(samples) % world)
            self.batches = [
                (_validation_batch(dataset, index), place < len(samples))
                for place, index in list(enumerate(padded))[rank::world]
            ]

    def __len__(self) -> int:
        return len(self.batches)

    @torch.no_grad()
    def loss(self, module: FlowMatchingModule) -> float:
        """Unweighted loss, mean over samples and SIGMAS; a collective, the same value on every rank."""
        was_training = module.training
        module.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        weighting, module.weighting = module.weighting, "none"
        for cpu_batch, counts in self.batches:
            batch = cpu_batch.to(self.device)
            latents, prompt = self.encoder(batch)
            for sigma in SIGMAS:
                loss = module(latents, batch.noise, torch.full_like(batch.sigma, sigma), prompt)
                total += torch.stack([loss.double().sum(), torch.tensor(1.0, device=self.device)]) * counts
        module.weighting = weighting
        module.train(was_training)
        if dist.is_initialized():
            dist.all_reduce(total)
        return (total[0] / total[1]).item()


def _validation_batch(dataset: ShardDataset, index: int) -> Batch:
    def draw(epoch: int, virtual: int, latent_shape: tuple[int, ...]) -> Draws:
        noise = torch.randn(latent_shape, generator=sample_generator(_NOISE_SEED, 0, virtual))
        return Draws(noise, SIGMAS[0], drop_caption=False)

    return make_batch(dataset, place=0, epoch=0, indices=[index], draw=draw, attempts=0)
