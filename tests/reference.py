"""A slow, obvious FIT, written from the description of the architecture alone: the oracle of test_reference.py.

One example, one group, one head at a time, in float64, on variables by the reference's names. Nothing here is taken
from the library, and nothing is clever: a layer asks for its weights by name and shape as it runs (`Variables`), so
one run both computes the network and says which variables a network of these arguments has.
"""

import math
import zlib

import torch

ROOTS = {"FIT": "fit", "FITDenoiser": "fitdenoiser", "FITAR": "fitar"}
DEFAULTS = {
    "mlp_ratio": 4,
    "x_pos_encoding": "learned",
    "latent_pos_encoding": "learned",
    "mask": None,
    "self_cond": "none",
    "cond_proj": True,
    "x_self_attention": True,
    "xattn_with_mlp": False,
    "xattn_enc_ln": True,
    "shared_embedding": True,
    "output_bias": True,
}


class Variables(dict):
    """Named float64 weights; one that is not there yet is drawn, far from any initial value, by its name alone."""

    def __init__(self, root, given=()):
        super().__init__({name: torch.tensor(array).double().requires_grad_() for name, array in dict(given).items()})
        self.root, self.complete, self.used = root, bool(given), set()

    def take(self, name, *shape):
        name = f"{self.root}/{name}:0"
        if name not in self:
            assert not self.complete, f"{name} is not among the given variables"
            self[name] = draw(name, shape).double().requires_grad_()
        self.used.add(name)
        assert tuple(self[name].shape) == shape, (name, tuple(self[name].shape), shape)
        return self[name]


def draw(name, shape):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("gamma:0"):
        return 1 + 0.3 * noise
    if name.endswith("kernel:0"):
        inputs = shape[0] * shape[1] if "attention_output" in name else shape[0]
        return noise / math.sqrt(inputs)
    return 0.3 * noise


# Building blocks ------------------------------------------------------------------------------------------------------


def norm(v, name, x):
    width = x.shape[-1]
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
    return scaled * v.take(f"{name}/gamma", width) + v.take(f"{name}/beta", width)


def linear(v, name, x, outputs):
    return x @ v.take(f"{name}/kernel", x.shape[-1], outputs) + v.take(f"{name}/bias", outputs)


def attention(v, name, x, context, width, heads, looks=None):
    """Attend from x (q, .) to context (k, .); looks(i, j) says whether query i may look at key j."""
    head_width = width // heads

    def project(part, tokens, h):
        kernel = v.take(f"{name}/{part}/kernel", tokens.shape[-1], heads, head_width)
        return tokens @ kernel[:, h] + v.take(f"{name}/{part}/bias", heads, head_width)[h]

    out = v.take(f"{name}/attention_output/bias", x.shape[-1])
    out_kernel = v.take(f"{name}/attention_output/kernel", heads, head_width, x.shape[-1])
    for h in range(heads):
        scores = project("query", x, h) @ project("key", context, h).T / math.sqrt(head_width)
        if looks is not None:
            hidden = torch.tensor([[not looks(i, j) for j in range(len(context))] for i in range(len(x))])
            scores = scores.masked_fill(hidden, -math.inf)
        out = out + torch.softmax(scores, dim=-1) @ project("value", context, h) @ out_kernel[h]
    return out


def ffn(v, name, x, ratio):
    width = x.shape[-1]
    hidden = linear(v, f"{name}/dense1", norm(v, f"{name}/ln", x), int(ratio * width))
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(v, f"{name}/dense2", hidden, width)


def self_layer(v, name, part, x, heads, ratio, looks=None):
    """Layer of one stack; `part` is the name of its attention, None for a layer without."""
    if part is not None:
        normed = norm(v, f"{name}/{part}/ln", x)
        x = x + attention(v, f"{name}/{part}", normed, normed, x.shape[-1], heads, looks)
    return ffn(v, f"{name}/mlp/ffn", x, ratio)


def cross_layer(v, name, x, context, width, heads, context_norm, mlp_ratio=None):
    if context_norm:
        context = norm(v, f"{name}/cross_mha/enc_ln", context)
    x = x + attention(v, f"{name}/cross_mha", norm(v, f"{name}/cross_mha/ln", x), context, width, heads)
    return x if mlp_ratio is None else ffn(v, f"{name}/mlp/ffn", x, mlp_ratio)


# Positions ------------------------------------------------------------------------------------------------------------


def code(u, width):
    angles = [u / 10000 ** (2 * (i // 2) / width) for i in range(width)]
    return [math.sin(a) for a in angles[0::2]] + [math.cos(a) for a in angles[1::2]]


def line_codes(length, width):
    return [code(p / (length - 1) * 1000 if length > 1 else 0.0, width) for p in range(length)]


def grid_codes(rows, columns, width):
    if rows == 1 or columns == 1:
        return line_codes(rows * columns, width)
    half = width // 2
    return [row + column for row in line_codes(rows, half) for column in line_codes(columns, half)]


def positions(v, name, kind, rows, columns, width):
    if kind == "learned":
        return v.take(f"{name}/kernel/vis_pos_embedding", rows * columns, width)
    return torch.tensor(grid_codes(rows, columns, width), dtype=torch.float64)


# The trunk ------------------------------------------------------------------------------------------------------------


def plan(layers):
    return [tuple(int(count or 0) for count in block.split(")")) for block in layers.split("(")[1:]]


def suffix(i):
    return f"_{i}" if i else ""


def trunk(v, k, x, latents, condition=None, autoregressive=False):
    """One example: x a list of each group's tokens (n, c), latents a list of each group's (m, d)."""
    groups, m = range(len(x)), len(latents[0])
    width, heads = min(k["x_dim"], k["latent_dim"]), min(k["x_num_heads"], k["latent_num_heads"])
    stack, part = ("transformer_decoder_layer", "self_mha") if autoregressive else ("transformer_encoder", "mha")
    local_part = part if k["x_self_attention"] else None
    triangle = (lambda i, j: j <= i) if autoregressive else None
    earlier = (lambda i, j: j // m <= i // m) if autoregressive or k["mask"] == "causal" else None
    mlp_ratio = k["mlp_ratio"] if k["xattn_with_mlp"] else None

    def cross(name, queries, context):
        return cross_layer(v, name, queries, context, width, heads, k["xattn_enc_ln"], mlp_ratio)

    blocks = plan(k["layers"])
    for i, (local, glob) in enumerate(blocks):
        for j in range(local):
            name = f"x_network{suffix(i)}/{stack}{suffix(j)}"
            x = [self_layer(v, name, local_part, x[g], k["x_num_heads"], k["mlp_ratio"], triangle) for g in groups]
        if glob == 0:
            continue
        latents = torch.cat([cross(f"l2x_cross_attn{suffix(i)}", latents[g], x[g]) for g in groups])
        if condition is not None:
            heads_c, d = k["latent_num_heads"], k["latent_dim"]
            name = f"l2c_cross_attn{suffix(i)}"
            latents = cross_layer(v, name, latents, condition, d, heads_c, k["xattn_enc_ln"])
        for j in range(glob):
            name = f"l_network{suffix(i)}/{stack}{suffix(j)}"
            latents = self_layer(v, name, part, latents, k["latent_num_heads"], k["mlp_ratio"], earlier)
        latents = [latents[g * m : (g + 1) * m] for g in groups]
        if i < len(blocks) - 1:
            source = [torch.zeros_like(latents[0]), *latents[:-1]] if autoregressive else latents
            x = [cross(f"x2l_cross_attn{suffix(i)}", x[g], source[g]) for g in groups]
    return x, latents


# The roles ------------------------------------------------------------------------------------------------------------


def tables(v, k):
    """Position tables of data tokens (n, c) and of latents, a list of each group's (m, d)."""
    n, t, m = k["x_size"] // k["num_groups"], k["num_groups"], k["latents_per_group"]
    kind = k["x_pos_encoding"]
    rows = math.isqrt(n) if kind == "sin_cos2d" else 1
    of_tokens = positions(v, "x_pos_emb", kind, rows, n // rows, k["x_dim"])
    of_latents = positions(v, "latent_pos_emb", k["latent_pos_encoding"], t, m, k["latent_dim"])
    return of_tokens, list(of_latents.split(m))


def encoder(v, k, x, y=None):
    of_tokens, latents = tables(v, k)

    def stem(name, tokens):
        return norm(v, f"{name}_ln", linear(v, name, tokens, k["x_dim"]))

    outputs, all_latents = [], []
    for example in range(len(x)):
        groups = [stem("stem", group) + of_tokens for group in x[example]]
        if y is not None:
            groups = [torch.cat([stem("stem_y", y[example, g]), group]) for g, group in enumerate(groups)]
        out, out_latents = trunk(v, k, groups, latents)
        outputs.append(norm(v, "x_output_ln", torch.stack(out)))
        all_latents.append(norm(v, "l_output_ln", torch.stack(out_latents)))
    return torch.stack(outputs), torch.stack(all_latents)


def time_token(v, k, time):
    gamma, *extra = time.reshape(-1)
    d = k["latent_dim"]
    embedded = torch.tensor(code(1000 * gamma.item(), d // 4), dtype=torch.float64)
    embedded = (embedded - embedded.mean()) / torch.sqrt(((embedded - embedded.mean()) ** 2).mean())
    hidden = linear(v, "time_emb/dense0", embedded[None], d)
    hidden = hidden * torch.sigmoid(hidden)
    return linear(v, "time_emb/dense1", torch.cat([hidden, torch.tensor(extra).double()[None]], dim=1), d)


def denoiser(v, k, x, time, cond=None, latents_prev=None):
    of_tokens, initial = tables(v, k)
    outputs, all_latents = [], []
    for example in range(len(x)):
        condition = time_token(v, k, time[example])
        if cond is not None:
            tokens = cond[example].reshape(-1, cond.shape[-1])
            tokens = linear(v, "cond_proj", tokens, k["latent_dim"]) if k["cond_proj"] else tokens
            condition = torch.cat([condition, tokens])
        latents = initial
        if k["self_cond"] == "latent":
            prev = [torch.zeros_like(one) for one in initial] if latents_prev is None else latents_prev[example]
            added = [ffn(v, "latent_prev_proj/ffn", one, k["mlp_ratio"]) for one in prev]
            latents = [one + norm(v, "latent_prev_ln", more) for one, more in zip(initial, added, strict=True)]
        groups = [norm(v, "stem_ln", linear(v, "stem", group, k["x_dim"])) + of_tokens for group in x[example]]
        out, out_latents = trunk(v, k, groups, latents, condition)
        outputs.append(linear(v, "x_output_linear", norm(v, "x_output_ln", torch.stack(out)), k["out_dim"]))
        all_latents.append(torch.stack(out_latents))
    return torch.stack(outputs), torch.stack(all_latents)


def autoregressive(v, k, tokens):
    of_tokens, latents = tables(v, k)
    names = ["token_embedding"] * 2 if k["shared_embedding"] else ["inp_token_embedding", "outp_token_embedding"]
    embedding, unembedding = (v.take(name, k["vocab_size"], k["x_dim"]) for name in names)
    outputs = []
    for example in tokens:
        groups = [torch.stack([embedding[token] for token in group]) + of_tokens for group in example]
        out, _ = trunk(v, k, groups, latents, autoregressive=True)
        logits = norm(v, "x_output_ln", torch.stack(out)) @ unembedding.T
        outputs.append(logits + v.take("outp_bias", k["vocab_size"]) if k["output_bias"] else logits)
    return (torch.stack(outputs),)


def run(kind, kwargs, inputs, variables=()):
    """Compute a network of the reference.

    Args:
        kind, kwargs: as `official.build` takes them.
        inputs: tensors by name.
        variables: arrays by name; drawn as they are needed if not given.

    Returns:
        outputs (float64), the loss of the conformance files, and the `Variables` that were used.
    """
    v = Variables(ROOTS[kind], variables)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    role = {"FIT": encoder, "FITDenoiser": denoiser, "FITAR": autoregressive}[kind]
    outputs = role(v, {**DEFAULTS, **kwargs}, **inputs)
    loss = sum(weight * out.sin().sum() for weight, out in zip((1.0, 0.5), outputs, strict=False))
    return outputs, loss, v
