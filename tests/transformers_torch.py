"""Small transformers in PyTorch, written out from their papers, each with another way from maps to tokens.

Each takes images of `SIDE` pixels, and has weights that `seeded` draws: as PyTorch makes them, class tokens and
positional embeddings are often zero.
"""

import torch
from torch import nn
from torch.nn import functional as F

SIDE, PATCH, WIDTH, HEADS, CLASSES = 32, 8, 12, 3, 5
GRID = SIDE // PATCH


def seeded(module, seed=0):
    """The module with every parameter drawn, and none of them zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            last = name.rpartition(".")[2]
            norm = "norm" in name and last == "weight"
            parameter.normal_(1 if norm else 0, 0.2 if norm else parameter.shape[-1] ** -0.5)
    return module.eval()


class Attention(nn.Module):
    """Self-attention with one linear layer for queries, keys and values (Vaswani et al. 2017, 1706.03762)."""

    def __init__(self, width=WIDTH, heads=HEADS):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, width))


class FusedAttention(Attention):
    """The same with `scaled_dot_product_attention`."""

    def forward(self, x):
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))


class ModuleAttention(nn.MultiheadAttention):
    """The same with `nn.MultiheadAttention`."""

    def __init__(self, width=WIDTH, heads=HEADS):
        super().__init__(width, heads, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Block(nn.Module):
    """Attention and two linear layers, each after a norm and beside a sum (Dosovitskiy et al. 2020, 2010.11929)."""

    def __init__(self, attention=Attention, width=WIDTH):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer with a class token in front (2010.11929).

    Args:
        front, behind: extra tokens; the first in front is the class token, without any the mean of all is taken.
        attention: of its blocks.
        columns: the tokens are the cells column by column.
        square: cells of the grid in each direction.
    """

    def __init__(self, front=1, behind=0, attention=Attention, columns=False, depth=3):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.front, self.behind = (
            nn.Parameter(torch.zeros(1, front, WIDTH)),
            nn.Parameter(torch.zeros(1, behind, WIDTH)),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, GRID**2 + front + behind, WIDTH))
        self.columns = columns
        self.blocks = nn.ModuleList(Block(attention) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def tokens(self, x):
        x = self.patch_embed(x)
        return (x.transpose(2, 3) if self.columns else x).flatten(2).transpose(1, 2)

    def forward(self, x):
        x = self.tokens(x)
        ends = [extra.expand(len(x), -1, -1) for extra in (self.front, self.behind)]
        if self.front.shape[1] or self.behind.shape[1]:
            x = torch.cat([ends[0], x, ends[1]], 1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.front.shape[1] else x.mean(1))


class SequenceFirst(ViT):
    """`nn.TransformerEncoder` as it is without arguments: `(tokens, n, c)`, and norms after the sums."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).layers

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.front.expand(x.shape[1], -1, -1).transpose(0, 1), x]) + self.pos_embed.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[0])


class Hybrid(ViT):
    """Convolutions that overlap, then a transformer (2010.11929, section 3.1)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 4, 1), nn.ReLU())
        self.patch_embed = nn.Conv2d(8, WIDTH, 1)

    def tokens(self, x):
        return super().tokens(self.stem(x))


class LateClassToken(ViT):
    """The class token joins after the first blocks (Touvron et al. 2021, 2103.17239)."""

    def forward(self, x):
        x = self.tokens(x) + self.pos_embed[:, 1:]
        x = self.blocks[1](self.blocks[0](x))
        x = self.blocks[2](torch.cat([self.front.expand(len(x), -1, -1), x], 1))
        return self.head(self.norm(x)[:, 0])


class Pyramid(ViT):
    """Tokens become a map, go through a convolution, and become tokens again (Wang et al. 2021, 2102.12122)."""

    def __init__(self):
        super().__init__(front=0)
        self.merge = nn.Conv2d(WIDTH, WIDTH, 2, 2)

    def forward(self, x):
        x = self.blocks[0](self.tokens(x))
        x = self.merge(x.transpose(1, 2).reshape(len(x), WIDTH, GRID, GRID)).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks[1](x)).mean(1))


class MixerBlock(nn.Module):
    """Linear layers over the tokens, then over the channels (Tolstikhin et al. 2021, 2105.01601)."""

    def __init__(self, width, tokens):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens, self.over_channels = nn.Linear(tokens, tokens), nn.Linear(width, width)

    def forward(self, x):
        x = x + self.over_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norm2(x))


class Mixer(nn.Module):
    """As many channels as tokens, so that shapes do not tell them apart."""

    def __init__(self, width=GRID**2):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, PATCH, PATCH)
        self.blocks = nn.Sequential(MixerBlock(width, GRID**2), MixerBlock(width, GRID**2))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.blocks(self.patch_embed(x).flatten(2).transpose(1, 2)).mean(1))


class Linear(ViT):
    """Patches are cut out of the image by their axes, and each goes through a linear layer."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Linear(3 * PATCH**2, WIDTH)

    def tokens(self, x):
        x = x.reshape(len(x), 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 3, 5, 1)
        return self.patch_embed(x.reshape(len(x), GRID**2, -1))


class Mixed(ViT):
    """Each token is made of the whole image."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Linear(GRID**2, GRID**2)

    def tokens(self, x):
        return self.mixing(self.patch_embed(x).flatten(2)).transpose(1, 2)


class AnySize(ViT):
    """The positional embedding is resized to the grid."""

    def forward(self, x):
        x = self.patch_embed(x)
        places = self.pos_embed[:, 1:].reshape(1, GRID, GRID, -1).permute(0, 3, 1, 2)
        x = x + F.interpolate(places, x.shape[2:], mode="bilinear")
        x = torch.cat([self.front.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def windows(x, side):
    """Maps `(n, h, w, c)` cut into windows `(n * windows, side * side, c)`."""
    n, h, w, width = x.shape
    x = x.view(n, h // side, side, w // side, side, width).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, side * side, width)


def joined(x, h, w, side):
    """The maps of which `windows` made `x`."""
    x = x.view(-1, h // side, w // side, side, side, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, h, w, x.shape[-1])


class WindowBlock(nn.Module):
    """Attention inside of windows, which are shifted where `shift` (Liu et al. 2021, 2103.14030)."""

    def __init__(self, width, grid, shift, maps):
        super().__init__()
        self.grid, self.shift, self.maps = grid, shift, maps
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        given, width = x, x.shape[-1]
        x = self.norm1(x).view(len(x), self.grid, self.grid, width)
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = joined(self.attn(windows(x, 2)), self.grid, self.grid, 2)
        x = torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x
        x = given + (x if self.maps else x.view(len(given), -1, width))
        return x + self.mlp(self.norm2(x))


class Merging(nn.Module):
    """Each square of four cells becomes one."""

    def __init__(self, width, grid, maps):
        super().__init__()
        self.grid, self.maps = grid, maps
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        x = x.view(len(x), self.grid, self.grid, x.shape[-1])
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduction(self.norm(x if self.maps else x.view(len(x), -1, x.shape[-1])))


class Swin(nn.Module):
    """Windows, shifted windows, and a grid that halves; tokens `(n, tokens, c)`, or `maps` `(n, h, w, c)`."""

    def __init__(self, maps=False):
        super().__init__()
        self.maps = maps
        self.patch_embed, self.norm0 = nn.Conv2d(3, WIDTH, PATCH, PATCH), nn.LayerNorm(WIDTH)
        self.stage1 = nn.Sequential(WindowBlock(WIDTH, GRID, 0, maps), WindowBlock(WIDTH, GRID, 1, maps))
        self.merge = Merging(WIDTH, GRID, maps)
        self.stage2 = nn.Sequential(WindowBlock(2 * WIDTH, GRID // 2, 0, maps))
        self.norm, self.head = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x):
        x = self.patch_embed(x)
        x = x.permute(0, 2, 3, 1) if self.maps else x.flatten(2).transpose(1, 2)
        x = self.norm(self.stage2(self.merge(self.stage1(self.norm0(x)))))
        return self.head(x.mean((1, 2)) if self.maps else x.mean(1))


def red_counter():
    """A ViT of one block whose first class is the mean red of the cells, which attention gathers in the class token.

    Every weight is zero but these: the patch convolution takes the mean red of a cell into channel 0; attention looks
    everywhere alike and hands on channel 0; the norms are left out.
    """
    module = seeded(ViT(depth=1))
    block = module.blocks[0]
    block.norm1, block.norm2, module.norm = nn.Identity(), nn.Identity(), nn.Identity()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.patch_embed.weight[0, 0] = 1 / PATCH**2
        block.attn.qkv.weight[2 * WIDTH, 0] = 1
        block.attn.proj.weight[0, 0] = 1
        module.head.weight[0, 0] = 1
    return module


def vit():
    """A small vision transformer."""
    return seeded(ViT())
