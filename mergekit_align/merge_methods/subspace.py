"""The alignment subspace: directions in which aligning a model moved a weight matrix.

Of a matrix V = W_aligned - W_unaligned, shape [out, in], Safe LoRA (arXiv 2405.16833, section 3.2)
takes the operator C = V V^T / ||V||_F, which maps an update of the weight to where V has moved it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from mergekit.merge_methods.base import TensorGroup


def is_matrix(group: TensorGroup) -> bool:
    """Whether a group's tensors multiply activations: neither embeddings nor norms or biases."""
    return group.tensors[0].ndim == 2 and group.metadata.vocabulary_axis is None


def project(alignment: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """C @ update [out, in], for the alignment vector V [out, in]; zero where V is."""
    norm = torch.linalg.matrix_norm(alignment)
    if not norm:
        return torch.zeros_like(update)
    rows, columns = alignment.shape
    scaled = update / norm
    # The product that goes through the smaller square matrix.
    if rows <= columns:
        return torch.matmul(alignment @ alignment.T, scaled)
    return torch.matmul(alignment, alignment.T @ scaled)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of the angle between two tensors, flattened; 1 where one is zero: nothing deviates."""
    norms = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return float((a * b).sum() / norms) if norms else 1.0


class Spectrum(NamedTuple):
    """A matrix M [out, in] by its singular values."""

    matrix: torch.Tensor
    values: torch.Tensor
    """Singular values, the largest first."""
    directions: torch.Tensor
    """Singular vectors of the shorter side, in the values' order, [side, values]."""

    def leading(self, rank: int) -> torch.Tensor:
        """The part of M in its `rank` leading left singular directions, U_k U_k^T M."""
        if rank >= len(self.values):
            return self.matrix
        chosen = self.directions[:, :rank]
        rows, columns = self.matrix.shape
        if rows <= columns:
            return torch.matmul(chosen, chosen.T @ self.matrix)
        return torch.matmul(self.matrix @ chosen, chosen.T)


def spectrum(matrix: torch.Tensor) -> Spectrum:
    """Singular values of a matrix, and directions as eigenvectors of its smaller Gram matrix."""
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    values, directions = torch.linalg.eigh(gram)
    return Spectrum(matrix, values.clamp(min=0).sqrt().flip(0), directions.flip(1))
