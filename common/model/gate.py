"""The gate: from the pooled embedding of the frozen encoder to one logit per routed expert.

Shape letters: B utterances of a batch, N of a set, D embedding width, E experts.
"""

import torch
from torch import Tensor, nn

NO_LIMIT = 1e30  # a distance that nothing has: files of weights hold no infinity
SHRINKAGE = 0.1  # of a covariance towards a sphere: there are few utterances per dimension
FAR = 0.99  # quantile of dev's distances to the nearest group beyond which the gate abstains (`asr.abstain`)


class Gate(nn.Module):
    """A small MLP over standardised embeddings, with the means and the covariances of its groups.

    Args:
        dim: D, width of the embedding.
        hidden: width of the hidden layer.
        num_experts: E.
        dropout: on the hidden layer.

    Shape:
        embedding_BD → logits_BE. `mean_D` and `std_D` standardise the embedding; `fit_scale` sets them. `center_ED` are
        the groups' means in that scale, `whiten_DD` whitens the deviations within groups, `whiten_all_DD` those of all
        utterances from their mean. `limit` is the distance beyond which the gate abstains, since the utterance is
        unlike all groups (`NO_LIMIT` until `calibrate`).
    """

    mean_D: Tensor
    std_D: Tensor
    center_ED: Tensor
    whiten_DD: Tensor
    whiten_all_DD: Tensor
    limit: Tensor

    def __init__(self, dim: int, hidden: int, num_experts: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("std_D", torch.ones(dim))
        self.register_buffer("center_ED", torch.zeros(num_experts, dim))
        self.register_buffer("whiten_DD", torch.eye(dim))
        self.register_buffer("whiten_all_DD", torch.eye(dim))
        self.register_buffer("limit", torch.tensor(NO_LIMIT))
        self.dim, self.hidden, self.num_experts = dim, hidden, num_experts
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, num_experts))

    def fit_scale(self, embeddings_ND: Tensor) -> None:
        """Sets mean and standard deviation from embeddings, so that the input of the MLP has unit scale."""
        self.mean_D.copy_(embeddings_ND.mean(0))
        self.std_D.copy_(embeddings_ND.std(0, correction=0).clamp_min(1e-6))

    def fit_centers(self, embeddings_ND: Tensor, label_N: Tensor) -> None:
        """Sets the groups' means, and the covariances within and over groups, from embeddings and their groups.

        The embeddings are those of `fit_scale`, whose mean is 0 in the gate's scale.
        """
        scaled_ND = self.standardise(embeddings_ND)
        for expert in range(self.num_experts):
            if (members_N := label_N == expert).any():
                self.center_ED[expert] = scaled_ND[members_N].mean(0)
        self.whiten_DD.copy_(_whitening(scaled_ND - self.center_ED[label_N]))
        self.whiten_all_DD.copy_(_whitening(scaled_ND))

    def calibrate(self, embeddings_ND: Tensor) -> None:
        """Sets the distance beyond which the gate abstains, from held-out speakers of the groups."""
        self.limit.copy_(self.distance(embeddings_ND).quantile(FAR))

    def standardise(self, embedding_BD: Tensor) -> Tensor:
        """Embeddings in the gate's scale, fp32."""
        return (embedding_BD.float() - self.mean_D) / self.std_D

    def distance(self, embedding_BD: Tensor) -> Tensor:
        """distance_B to the nearest group, relative to the distance to all training utterances together.

        Squared Mahalanobis distances, per dimension. The difference leaves out the dimensions in which an utterance is
        as unusual for all speech as for its group (Ren et al. 2021, arXiv:2106.09022).
        """
        with torch.autocast(embedding_BD.device.type, enabled=False):
            scaled_BD = self.standardise(embedding_BD)
            near_B = torch.cdist(scaled_BD @ self.whiten_DD, self.center_ED @ self.whiten_DD).min(1).values
            return (near_B.square() - (scaled_BD @ self.whiten_all_DD).square().sum(1)) / self.dim

    def evidence(self, embedding_BD: Tensor) -> Tensor:
        """Evidence of an utterance about its group; sums over a speaker's utterances are the evidence about the
        speaker.

        Returns:
            evidence_BF, F = E + 2: log-probabilities, distance to the nearest group, and 1 as the count.
        """
        log_probs_BE = self(embedding_BD).log_softmax(1)
        distance_B1 = self.distance(embedding_BD)[:, None]
        return torch.cat([log_probs_BE, distance_B1, torch.ones_like(distance_B1)], 1)

    def decide(self, evidence_BF: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_BE, known_B) of utterances or of speakers, from the sums of their `evidence`; not known are those for
        which the gate abstains.
        """
        logits_BE, distance_B, count_B = evidence_BF[:, :-2], evidence_BF[:, -2], evidence_BF[:, -1]
        return logits_BE, distance_B <= self.limit * count_B

    def forward(self, embedding_BD: Tensor) -> Tensor:
        # Always in fp32: with half precision, some utterances would get other experts than in the report.
        with torch.autocast(embedding_BD.device.type, enabled=False):
            logits_BE: Tensor = self.net(self.standardise(embedding_BD))
        return logits_BE


def _whitening(deviation_ND: Tensor) -> Tensor:
    """whiten_DD: deviations times it have a covariance of about 1 in every direction."""
    deviation_ND = deviation_ND.double()
    covariance_DD = deviation_ND.t() @ deviation_ND / len(deviation_ND)
    typical = covariance_DD.diagonal().mean().clamp_min(1e-6)
    covariance_DD = (1 - SHRINKAGE) * covariance_DD + SHRINKAGE * typical * torch.eye(len(covariance_DD)).to(
        covariance_DD
    )
    whiten_DD: Tensor = torch.linalg.inv(torch.linalg.cholesky(covariance_DD)).t()
    return whiten_DD
