"""The alignment subspace: directions in which aligning a model moved a weight matrix.

Of a matrix V = W_aligned - W_unaligned, shape [out, in], Safe LoRA (arXiv 2405.16833, section 3.2)
takes the operator C = V V^T / ||V||_F, which maps an update of the weight to where V has moved it.
"""

from __future__ import annotations

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


def leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The part of `matrix` [out, in] in its `rank` leading left singular directions, U_k U_k^T M.

    The directions are eigenvectors of the smaller Gram matrix, so that no full decomposition is made.
    """
    rows, columns = matrix.shape
    if rank >= min(rows, columns):
        return matrix
    if rows <= columns:
        directions = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]
        return torch.matmul(directions, directions.T @ matrix)
    directions = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:]
    return torch.matmul(matrix @ directions, directions.T)
