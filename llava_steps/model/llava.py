"""The parallel LLaVA: an HF vision tower, a projector and a megatron-core GPT.

One microbatch is one packed row, tokens [1, T] (see attention.Packed). Image tokens are already
expanded in the row; the projected features replace their embeddings, in order. Every pipeline stage
knows all shapes from the row.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from llava_steps.conversion.rope import RotaryTable
from llava_steps.core.errors import InputError
from llava_steps.geometry.geometry import Geometry
from llava_steps.model import compiled, te_spec
from llava_steps.model.adapters import Adapters
from llava_steps.model.attention import pack, upload
from llava_steps.model.head import Targets, best, hits, targets_of
from llava_steps.model.options import ModelOptions, transformer_config
from llava_steps.model.specs import LOCAL, block_spec, mark_tensor_parallel
from llava_steps.model.vision import (
    build_tower,
    image_features,
    plain_layer,
    shared_image_features,
)


class Projector(torch.nn.Module):
    """HF's multi_modal_projector: [.., vision_hidden] -> [.., hidden]. Replicated on all ranks."""

    def __init__(self, geometry: Geometry, dtype: torch.dtype) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self.act = ACT2FN[geometry.projector_act]
        sizes = ((geometry.vision_hidden, geometry.hidden), (geometry.hidden, geometry.hidden))
        self.linear_1, self.linear_2 = (
            torch.nn.utils.skip_init(  # type: ignore[no-untyped-call]
                torch.nn.Linear,
                *size,
                bias=geometry.projector_bias,
                device=torch.cuda.current_device(),
                dtype=dtype,
            )
            for size in sizes
        )

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return out


class Llava(MegatronModule):  # type: ignore[misc]
    """One pipeline chunk of the model. Build it with `build_llava`."""

    def __init__(self, geometry: Geometry, options: ModelOptions) -> None:
        config = transformer_config(geometry, options)
        super().__init__(config=config)
        self.geometry, self.options = geometry, options
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = options.pre_process, options.post_process
        # The schedules add the gradients of both copies, and a frozen head has none.
        frozen = options.freeze_lm or options.lora is not None
        self.share_embeddings_and_output_weights = geometry.tied and not frozen
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.rotary = RotaryTable(geometry)
        if self.pre_process:
            self.vision_tower = build_tower(geometry, options.dtype)
            self.mm_projector = Projector(geometry, options.dtype)
        number = options.chunk if options.vp > 1 else None
        layer, linears = TransformerLayer, LOCAL
        if options.spec == "te":
            layer, linears = te_spec.TeLayer, te_spec.linears()
        elif options.compiled:
            layer = compiled.CompiledLayer
        self.language_model = GPTModel(
            config,
            block_spec(geometry, get_num_layers_to_build(config, number), layer, linears),
            vocab_size=geometry.vocab,
            max_sequence_length=geometry.max_positions,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=geometry.tied,
            position_embedding_type="none",
            scatter_embedding_sequence_parallel=False,
            vp_stage=number,
        )
        mark_tensor_parallel(self.language_model)
        if layer is compiled.CompiledLayer:
            fp8 = options.fp8 is not None
            compiled.install(self.language_model.decoder, geometry, options.flash, fp8)
        self._vision_layer = compiled.run_vision_layer if options.compiled else plain_layer
        self.lora: Adapters | None = None
        if options.lora:
            self.lora = Adapters(options.lora, self.language_model.decoder.layers, geometry)
        self._freeze()

    def _freeze(self) -> None:
        if self.options.freeze_lm or self.options.lora:
            self.language_model.requires_grad_(False)
        if self.pre_process and self.options.freeze_vision:
            self.vision_tower.requires_grad_(False)
        if self.pre_process and self.options.freeze_projector:
            self.mm_projector.requires_grad_(False)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Called by the schedules with the activations [T (/tp), 1, hidden] of the stage before."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight on the first and last stage; the schedules reduce its gradients."""
        weight: Tensor | None = self.language_model.shared_embedding_or_output_weight()
        return weight

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        wanted: Literal["loss", "score", "next"] = "loss",
    ) -> Tensor:
        """One packed row. Host tensors are read on the host, so that it does not wait for the GPU.

        tokens int64 [1, T]; position_ids int64 [1, T], from 0 in every sample; cu_seqlens int32
        [n+1], padding at the end being a separate sample; max_seqlen >= the longest sample;
        pixel_values [images, 3, H, W] (first stage) or None; labels int64 [1, T], labels[t] being
        the target at position t and -100 no target (last stage), or None.

        Last stage: without labels logits fp32 [T, vocab], gathered over tensor parallel; with
        labels the losses fp32 [targets] of the positions that have one, in order; with `score`
        fp32 [2, targets], the losses and whether no other id is more likely; with `next` only the
        most likely ids, int64 [targets]. Other stages: activations [T (/tp), 1, hidden].
        InputError when image tokens and features differ in number, or T does not divide by tp
        under sequence parallel.
        """
        if self.options.sequence_parallel and tokens.shape[1] % self.options.tp:
            raise InputError(
                f"a row of {tokens.shape[1]} tokens does not divide by tp {self.options.tp}; "
                "with sequence_parallel, rows must be padded to a multiple of it"
            )
        device, options = next(self.parameters()).device, self.options
        cos, sin = self.rotary(upload(position_ids[0], device), options.dtype)
        own = options.compiled or options.spec == "te"
        targets = None
        if self.post_process and labels is not None:
            targets = targets_of(labels, device, options.compiled and wanted == "loss")
        chosen = targets.positions if targets and targets.exclusive else None
        packed = pack(cu_seqlens, max_seqlen, cos, sin, own, options.flash, chosen)
        hidden: Tensor = self.language_model.decoder(
            hidden_states=self._embed(tokens, pixel_values) if self.pre_process else None,
            attention_mask=None,
            packed_seq_params=packed,
        )
        if not self.post_process:
            return hidden
        return self._logits(hidden) if targets is None else self._losses(hidden, targets, wanted)

    def _embed(self, tokens: Tensor, pixel_values: Tensor | None) -> Tensor:
        """tokens [1, T] -> [T, 1, hidden] with the image features in place, or this rank's part."""
        words = self.language_model.embedding.word_embeddings
        device = words.weight.device
        is_image = tokens[0] == self.geometry.image_token_id
        positions = is_image.nonzero().squeeze(1)
        images = 0 if pixel_values is None else pixel_values.shape[0]
        if positions.numel() != images * self.geometry.tokens_per_image:
            raise InputError(
                f"{positions.numel()} image tokens in a row with {images} images of "
                f"{self.geometry.tokens_per_image} tokens each; samples must not be cut in an image"
            )
        # Tower and projector come before the words, with and without an image: if weights are
        # fetched during the forward pass, all ranks must request them in the same order.
        features = nothing = None
        if pixel_values is not None and images:
            features = self.mm_projector(self._features(upload(pixel_values, device))).flatten(0, 1)
        else:
            nothing = self._no_image()
        if self.options.compiled:
            texts = (~is_image).nonzero().squeeze(1)
            tokens, texts, positions = (upload(x, device) for x in (tokens[0], texts, positions))
            none = words.weight.new_empty(0, words.weight.shape[1])
            features = none if features is None else features
            embeddings: Tensor = compiled.embed(words.weight, features, tokens, texts, positions)
        else:
            embeddings = words(upload(tokens, device)).squeeze(0)
            if features is not None:
                positions = upload(positions, device)
                embeddings = embeddings.index_copy(0, positions, features.to(embeddings.dtype))
        if nothing is not None:
            embeddings = embeddings + nothing
        embeddings = embeddings.unsqueeze(1)
        if self.options.sequence_parallel:
            # The clone frees the whole row, of which the scatter returns a view.
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings).clone()
        if self.options.lora and not embeddings.requires_grad:
            # Recomputed layers get gradients only if their input requires one.
            embeddings.requires_grad_()
        return embeddings

    def _features(self, pixels: Tensor) -> Tensor:
        run = self._vision_layer
        if self.options.compiled and len(pixels) == 1:
            # The compiler treats 1 as a constant, not as a number of images.
            return self._features(pixels.expand(2, -1, -1, -1))[:1]
        if self.options.freeze_vision:
            return shared_image_features(
                self.vision_tower, pixels, self.geometry, self.tp_group, run
            )
        # Every tensor-parallel rank encodes all images: equal inputs, hence equal gradients.
        return image_features(self.vision_tower, pixels, self.geometry, run)

    def _no_image(self) -> Tensor | float:
        """A zero that depends on every trainable image parameter.

        A row of text must still give each of them a gradient, because the gradient reduction of
        other ranks waits for it.
        """
        g = self.geometry
        weight = self.mm_projector.linear_1.weight
        if not self.options.freeze_vision:
            blank = weight.new_zeros(1, 3, g.image_size, g.image_size)
            features = image_features(self.vision_tower, blank, g)
        elif not self.options.freeze_projector:
            features = weight.new_zeros(1, g.vision_hidden)
        else:
            return 0.0
        zero: Tensor = 0.0 * self.mm_projector(features).sum()
        return zero

    def _whole_row(self, hidden: Tensor) -> Tensor:
        """[T (/tp), 1, hidden] -> [T, hidden] on every tensor-parallel rank."""
        if self.options.sequence_parallel:
            # The head of each rank covers a part of the vocabulary: backward adds its gradients.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True
            )
        return hidden.squeeze(1)

    def _head(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] -> logits fp32 [n, vocab / tp], this rank's part of the vocabulary."""
        if not self.options.sequence_parallel:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        return F.linear(hidden, self._head_weight()).float()

    def _head_weight(self) -> Tensor:
        lm, tied = self.language_model, self.geometry.tied
        weight: Tensor = lm.shared_embedding_or_output_weight() if tied else lm.output_layer.weight
        return weight

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._head(self._whole_row(hidden))
        whole: Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
        return whole

    def _losses(self, hidden: Tensor, targets: Targets, wanted: str) -> Tensor:
        if targets.exclusive:
            losses = compiled.losses(hidden.squeeze(1), self._head_weight(), targets.ids)
            return losses[: targets.number]
        logits = self._head(self._whole_row(hidden).index_select(0, targets.positions))
        if wanted == "next":
            return best(logits)
        # Before the loss, which overwrites the logits.
        right = hits(logits, targets.ids) if wanted == "score" else None
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits, targets.ids)
        return losses if right is None else torch.stack([losses, right])

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """megatron-core's sharded state dict without `_extra_state`, which is always empty here."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


def build_llava(geometry: Geometry, options: ModelOptions) -> Llava:
    """One pipeline chunk with undefined weights; load a checkpoint before use.

    Needs initialised model parallelism of the same tp and pp (and, with sequence parallel,
    `tensor_parallel.model_parallel_cuda_manual_seed`). On a machine without CUDA the shim must be
    installed first (`cpu_shim.install()`). ConfigError when the layout does not fit the geometry.
    """
    return Llava(geometry, options)
