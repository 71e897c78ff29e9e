"""Criss-cross attention: every pixel looks along its own row and its own column.

Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation" (2019), section 3.2. After two layers every pixel has
heard from every other, at (H + W) instead of H * W comparisons for each.
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class CrissCrossAttention(nn.Module):
    """(B, C, H, W) -> (B, C, H, W): the input plus what its row and its column have to say, weighted by a learned `gamma`.

    Row and column have a softmax each, and their outcomes are summed. `gamma` starts at 0, so a new layer changes nothing.
    """

    def __init__(self, channels: int, reduction: int = 8):
        super().__init__()
        inner = max(channels // reduction, 1)
        self.qkv = nn.Conv2d(channels, 3 * inner, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.project = nn.Conv2d(inner, channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        if x.device.type == "cpu":  # with heads this small, the CPU kernel takes 2 to 4 times as long in bfloat16
            qkv = qkv.float()
        with torch.autocast("cpu", enabled=False):
            q, k, v = qkv.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).chunk(3, dim=-1)  # (B, H, W, C')
            rows = scaled_dot_product_attention(q, k, v)  # attends over W
            columns = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # over H
        seen = (rows + columns.transpose(1, 2)).permute(0, 3, 1, 2)  # (B, C', H, W)
        return x + self.project(self.gamma * seen)
