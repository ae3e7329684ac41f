"""A language model of spiking neurons whose synapses are watched by astrocytes: fixed state, whatever the context.

After "Astrocyte-Enabled Advancements in Spiking Neural Networks for Large Language Modeling", Shen et al., 2023,
arXiv:2312.07625. The paper's equations were not found: these keep its parts and are our choice. With spikes k, v in
{-1, 0, 1}

    u_t = β u_{t-1} + (1 - β) W_in x_t,   s_t = S±(û_t)   fast neuron, one threshold, no reset
    A_t = Λ A_{t-1} + k_t v_tᵀ                           slow astrocyte: a trace of synaptic co-activity, per head m × m
    r_t = q_tᵀ A_t,   out = W_o (s_t + σ(g_t) r̂_t)      its feedback onto transmission

where a hat divides by the root mean square over the neurons (of a head for r), so that rates and feedback keep their
size however long the trace has grown. A token costs O(H m²); sequences run in chunks, with the same result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.errors import ConfigurationError, ModelLoadError
from hasten.files import write_text
from hasten.nn.norm import RMSNorm
from hasten.spiking.scan import gate, leak_scan
from hasten.spiking.surrogate import Surrogate

__all__ = ["AstroConfig", "AstroLM", "AstroState", "AstroStream"]

_CHUNK = 64
_TOGETHER = 32  # chunks that run at once; bounds the square of shares between them
_EPSILON = 1e-3  # of a mean square: below it nothing was said


@dataclass(frozen=True)
class AstroConfig:
    """Sizes.

    >>> AstroConfig.small().head_size
    32
    """

    vocab: int = 256
    """tokens; 256 for bytes"""
    width: int = 128
    """channels of the residual stream"""
    layers: int = 4
    """blocks"""
    head_size: int = 32
    """side m of an astrocyte's matrix; divides the width"""
    feed_forward: int = 512
    """hidden neurons of each block's second part"""
    astrocyte: bool = True
    """False: neurons only, the ablation"""
    threshold: float = 1.2
    """of every spike, in root mean squares of its layer: 1.2 lets 23 % of normally distributed neurons fire"""
    surrogate: str = "arctan"
    """gradient of the spike"""
    shortest: float = 4.0
    """shortest time constant of an astrocyte at the beginning, tokens"""
    longest: float = 2048.0
    """longest"""

    def __post_init__(self) -> None:
        if self.width % self.head_size:
            raise ConfigurationError(f"head_size {self.head_size} does not divide the width {self.width}")
        if not 1 < self.shortest <= self.longest:
            raise ConfigurationError(
                f"time constants from {self.shortest} to {self.longest} tokens must rise from above 1"
            )

    @classmethod
    def small(cls, vocab: int = 256) -> AstroConfig:
        """For a laptop."""
        return cls(vocab=vocab)

    @property
    def heads(self) -> int:
        """Astrocytes per layer."""
        return self.width // self.head_size

    @property
    def state_bytes(self) -> int:
        """Bytes of state of one sequence, ``L (H m² + 2 d) × 4``: a Transformer keeps ``2 L d n × 4`` for n tokens."""
        traces = self.heads * self.head_size**2 if self.astrocyte else 0
        return self.layers * (traces + 2 * self.width) * 4


class BlockState(NamedTuple):
    """State of one block: potential and last input (batch, width), trace (batch, heads, m, m)."""

    potential: Tensor
    before: Tensor
    trace: Tensor


AstroState = tuple[BlockState, ...]
"""One state per block."""


def scaled(z: Tensor) -> Tensor:
    """``z`` (…, neurons) over its root mean square."""
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + _EPSILON)


class Mixer(nn.Module):
    """The astrocyte-modulated spiking unit over tokens (batch, time, width)."""

    def __init__(self, config: AstroConfig) -> None:
        super().__init__()
        c = self.config = config
        self.surrogate = Surrogate(c.surrogate)
        self.inward = nn.Linear(c.width, (4 if c.astrocyte else 1) * c.width, bias=False)  # drive, query, value, gate
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.leak = nn.Parameter(torch.linspace(-1.0, 3.0, c.width))
        if c.astrocyte:
            self.key = nn.Linear(c.width, c.width, bias=False)
            self.opening = nn.Parameter(torch.full((c.width,), -1.5))  # an astrocyte that knows nothing yet is quiet
            self.shift = nn.Parameter(torch.linspace(0.0, 1.0, c.width))
            spread = torch.logspace(math.log10(c.shortest), math.log10(c.longest), c.width)
            self.tau = nn.Parameter(torch.log(torch.expm1(spread - 1.0)).reshape(c.heads, c.head_size))

    def time_constants(self) -> Tensor:
        """(heads, m), tokens, above 1."""
        return 1.0 + functional.softplus(self.tau)

    def forward(self, x: Tensor, state: BlockState, chunk: int = _CHUNK) -> tuple[Tensor, BlockState]:
        """x (batch, time, width) goes on from ``state``."""
        c = self.config
        decay = torch.sigmoid(self.leak)
        inward = self.inward(x).chunk(4 if c.astrocyte else 1, -1)
        current = (1 - decay) * inward[0]
        potential, last = leak_scan(current.transpose(0, 1), state.potential, decay)
        drive = self._fires(potential.transpose(0, 1))
        trace = state.trace
        if c.astrocyte:
            shifted = torch.cat([state.before.unsqueeze(1), x[:, :-1]], 1)
            key_input = x + self.shift * (shifted - x)
            q = self._heads(inward[1])
            k = self._heads(self._fires(self.key(key_input)))
            v = self._heads(self._fires(inward[2]))
            r, trace = recall(q.to(k.dtype), k, v, self.time_constants(), trace, chunk)
            drive = drive + torch.sigmoid(inward[3] + self.opening) * scaled(r).transpose(1, 2).flatten(2)
        return self.out(drive), BlockState(last, x[:, -1], trace)

    def _fires(self, z: Tensor) -> Tensor:
        """On and off spikes of z (batch, time, width)."""
        spikes = gate(z, self.config.threshold, self.surrogate, signed=True)
        self._heard(spikes)
        return spikes

    def _heard(self, spikes: Tensor) -> None:
        """A hook for measurements: what spikes were sent."""

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> (batch, heads, time, m)."""
        return x.unflatten(-1, (self.config.heads, self.config.head_size)).transpose(1, 2)


def recall(q: Tensor, k: Tensor, v: Tensor, tau: Tensor, trace: Tensor, chunk: int = _CHUNK) -> tuple[Tensor, Tensor]:
    """``A_t = exp(-1/tau) A_{t-1} + k_t v_tᵀ``, ``r_t = q_tᵀ A_t`` for all t, many chunks at once.

    q, k, v (batch, heads, time, m), tau (heads, m) per row of A, trace (batch, heads, m, m) -> r like q, the last
    trace. Within a chunk the decays of rows split into ``exp(-i/tau) exp(j/tau)``, so the sums are matrix products;
    tau above 1 and chunks of at most 64 keep them inside float32.
    """
    rate = (1.0 / tau).unsqueeze(1)  # (heads, 1, m)
    time, results, begin = q.shape[2], [], 0
    while begin < time:
        count = max(1, min(_TOGETHER, (time - begin) // chunk))
        size = min(chunk, time - begin)
        part = slice(begin, begin + count * size)
        r, trace = _chunks(q[:, :, part], k[:, :, part], v[:, :, part], rate, trace, count)
        results.append(r)
        begin = part.stop
    return (results[0] if len(results) == 1 else torch.cat(results, 2)), trace


def _chunks(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, trace: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """:func:`recall` over ``count`` chunks of equal size; rate (heads, 1, m) is that of the decay."""
    q, k, v = (x.unflatten(2, (count, -1)) for x in (q, k, v))  # (batch, heads, chunks, size, m)
    size = q.shape[3]
    at = torch.arange(1, size + 1, dtype=q.dtype, device=q.device).unsqueeze(-1) * rate  # (heads, size, m)
    faded, grown = q * torch.exp(-at).unsqueeze(1), k * torch.exp(at).unsqueeze(1)
    weights = (faded @ grown.transpose(-1, -2)).tril()
    kept = torch.exp(-size * rate).transpose(-1, -2)  # (heads, m, 1)
    added = kept.unsqueeze(1) * (grown.transpose(-1, -2) @ v)  # what each chunk leaves behind
    if count == 1:
        before, last = trace.unsqueeze(2), kept * trace + added[:, :, 0]
    else:  # the trace before chunk c: its decay over c chunks, and what those before it left, decayed since
        c = torch.arange(count + 1, dtype=q.dtype, device=q.device)
        since = c.unsqueeze(1) - 1 - c[:-1]  # (chunks + 1, chunks)
        share = torch.exp(-size * since.clamp_min(0) * rate.transpose(-1, -2).unsqueeze(-1)) * (since >= 0)
        with torch.autocast(q.device.type, enabled=False):
            traces = torch.einsum("hmcd,bhdmn->bhcmn", share, added.to(share.dtype))
        traces = traces + torch.exp(-size * c.reshape(-1, 1) * rate).unsqueeze(-1) * trace.unsqueeze(2)
        before, last = traces[:, :, :-1], traces[:, :, -1]
    return (weights @ v + faded @ before).flatten(2, 3), last


class FeedForward(nn.Module):
    """Linear, spike, linear: the second product is additions only."""

    def __init__(self, config: AstroConfig) -> None:
        super().__init__()
        self.config, self.surrogate = config, Surrogate(config.surrogate)
        self.up = nn.Linear(config.width, config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width)."""
        result: Tensor = self.down(gate(self.up(x), self.config.threshold, self.surrogate))
        return result


class AstroLM(nn.Module):
    """Embedding, blocks, tied head.

    >>> model = AstroLM(AstroConfig(vocab=16, width=32, layers=2, head_size=8, feed_forward=64))
    >>> model(torch.zeros(2, 10, dtype=torch.int64)).shape
    torch.Size([2, 10, 16])
    """

    def __init__(self, config: AstroConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab, c.width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.mixers = nn.ModuleList(Mixer(c) for _ in range(c.layers))
        self.feeds = nn.ModuleList(FeedForward(c) for _ in range(c.layers))
        self.norms = nn.ModuleList(RMSNorm(c.width) for _ in range(2 * c.layers + 1))
        for module in (*self.mixers, *self.feeds):
            last: Any = module.out if isinstance(module, Mixer) else module.down
            nn.init.normal_(last.weight, std=1.0 / math.sqrt(2 * c.layers * last.in_features))

    def init_state(self, batch: int = 1) -> AstroState:
        """Rest."""
        c, like = self.config, self.embedding.weight
        side = c.head_size if c.astrocyte else 0
        return tuple(
            BlockState(
                like.new_zeros(batch, c.width),
                like.new_zeros(batch, c.width),
                like.new_zeros(batch, c.heads, side, side),
            )  # fmt: skip
            for _ in range(c.layers)
        )

    def _checked(self, state: AstroState, batch: int) -> None:
        expected = [tuple(s.shape) for block in self.init_state(batch) for s in block]
        given = [tuple(s.shape) for block in state for s in block]
        if expected != given:
            raise ConfigurationError(f"the state has the shapes {given[:3]}, this model needs {expected[:3]} per block")

    def hidden(self, tokens: Tensor, state: AstroState | None = None, chunk: int = _CHUNK) -> tuple[Tensor, AstroState]:
        """tokens (batch, time) -> (batch, time, width) after the last norm, and the state after."""
        if state is None:
            state = self.init_state(len(tokens))
        else:
            self._checked(state, len(tokens))
        plain = torch.compiler.is_compiling() or torch.compiler.is_exporting() or not tokens.numel()
        if not plain and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab:
            raise ConfigurationError(
                f"tokens from {int(tokens.min())} to {int(tokens.max())} are not all in 0 … {self.config.vocab - 1}"
            )
        x = self.embedding(tokens)
        after = []
        for index, held in enumerate(state):
            mixed, new = self.mixers[index](self.norms[2 * index](x), held, chunk)
            x = x + mixed
            x = x + self.feeds[index](self.norms[2 * index + 1](x))
            after.append(new)
        return self.norms[-1](x), tuple(after)

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, width) -> (…, vocab)."""
        return functional.linear(hidden, self.embedding.weight) / math.sqrt(self.config.width)

    def forward(self, tokens: Tensor, chunk: int = _CHUNK) -> Tensor:
        """tokens (batch, time) -> logits (batch, time, vocab)."""
        return self.logits(self.hidden(tokens, None, chunk)[0])

    def loss(self, tokens: Tensor) -> Tensor:
        """Next-token cross-entropy of (batch, time + 1) in nats."""
        return functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def step(self, token: Tensor, state: AstroState) -> tuple[Tensor, AstroState]:
        """One token (batch,) -> logits (batch, vocab), state; time and memory do not depend on what came before."""
        hidden, state = self.hidden(token.unsqueeze(1), state, 1)
        return self.logits(hidden[:, 0]), state

    @torch.inference_mode()
    def generate(
        self, prompt: Sequence[int] | Tensor, max_new: int, temperature: float = 0.8, seed: int | None = None
    ) -> list[int]:
        """Continue ``prompt`` (token ids, at least one); temperature 0 takes the likeliest."""
        ids = torch.as_tensor(prompt, dtype=torch.int64).reshape(1, -1)
        if not ids.numel():
            raise ConfigurationError("an empty prompt has no continuation; give at least one token")
        generator = torch.Generator().manual_seed(seed if seed is not None else 0)
        hidden, state = self.hidden(ids)
        logits, out = self.logits(hidden[:, -1]), []
        for _ in range(max_new):
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[0]
            else:
                token = logits.argmax(-1)
            out.append(int(token))
            logits, state = self.step(token, state)
        return out

    @torch.inference_mode()
    def astrocyte_trace(self, tokens: Tensor) -> Tensor:
        """Norm of every astrocyte's matrix after each token: (layers, heads, time) for tokens (time,)."""
        if not self.config.astrocyte:
            raise ConfigurationError("this model has no astrocytes; make one with AstroConfig(astrocyte=True)")
        state, rows = self.init_state(1), []
        for token in tokens:
            _, state = self.step(token.reshape(1), state)
            rows.append(torch.stack([s.trace[0].flatten(1).norm(dim=1) for s in state]))
        return torch.stack(rows, -1)

    @torch.inference_mode()
    def spike_rates(self, tokens: Tensor) -> dict[str, float]:
        """Share of on or off spikes of the neurons, keys, values and feed-forward neurons on tokens (batch, time)."""
        heard: dict[str, list[float]] = {"neuron": [], "key": [], "value": [], "feed-forward": []}
        removes: list[Any] = []
        for mixer in self.mixers:
            order = iter(["neuron", "key", "value"])
            note: Any = lambda s, order=order: heard[next(order)].append(float(s.abs().mean()))  # noqa: E731
            mixer._heard = note  # type: ignore[assignment, method-assign]
            removes.append(lambda mixer=mixer: delattr(mixer, "_heard"))
        for feed in self.feeds:
            hook = feed.down.register_forward_pre_hook(  # type: ignore[operator, union-attr]
                lambda _, args: heard["feed-forward"].append(float(args[0].mean()))
            )
            removes.append(hook.remove)
        try:
            self(tokens)
        finally:
            for remove in removes:
                remove()
        return {k: sum(v) / len(v) for k, v in heard.items() if v}

    def stream(self) -> AstroStream:
        """The model over a stream of tokens."""
        return AstroStream(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """``config.json`` and ``model.safetensors``."""
        from safetensors.torch import save

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "config.json", json.dumps(asdict(self.config), indent=2) + "\n")
        temporary = path / ".model.safetensors.part"
        temporary.write_bytes(save({k: v.detach().contiguous() for k, v in self.state_dict().items()}))
        temporary.replace(path / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> AstroLM:
        """The inverse of :meth:`save_pretrained`; raises :class:`~hasten.errors.ModelLoadError`."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(folder)
        try:
            model = cls(AstroConfig(**json.loads((path / "config.json").read_text(encoding="utf-8"))))
            model.load_state_dict(load_file(path / "model.safetensors"))
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelLoadError(f"{str(path)!r} holds no AstroLM ({line}); save one with save_pretrained") from error
        return model.eval()

    def neurons_only(self) -> AstroConfig:
        """The configuration without astrocytes whose width brings it closest to as many parameters."""
        wanted = sum(p.numel() for p in self.parameters())
        c = self.config
        ratio = c.feed_forward / c.width
        best = min(
            (abs(_size(c, w, ratio) - wanted), w) for w in range(c.head_size, 4 * c.width, c.head_size // 4 or 1)
        )[1]
        return replace(c, astrocyte=False, width=best, head_size=best, feed_forward=round(ratio * best))


def _size(c: AstroConfig, width: int, ratio: float) -> int:
    """Parameters of a model without astrocytes."""
    block = 2 * width * width + width + 2 * width * round(ratio * width) + 2 * width
    return c.vocab * width + c.layers * block + width


class AstroStream:
    """Tokens in, logits out: ``push(ids)`` gives one (vocab,) per token; the state never grows. Not thread-safe."""

    def __init__(self, model: AstroLM) -> None:
        self.model = model.eval()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._state = self.model.init_state(1)

    @torch.inference_mode()
    def push(self, chunk: Sequence[int] | Tensor) -> list[Tensor]:
        """Logits after each token of the chunk."""
        ids = torch.as_tensor(chunk, dtype=torch.int64).reshape(1, -1)
        if not ids.numel():
            return []
        hidden, self._state = self.model.hidden(ids, self._state)
        return list(self.model.logits(hidden[0]).unbind(0))

    def flush(self) -> list[Tensor]:
        """Nothing is held back."""
        return []
