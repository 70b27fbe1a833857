"""Kernels of plm: attention on packed sequences, rotary positions, packed weights, norms, gates. Imports only torch."""

from plm_kernels.backends import Backend, KernelWarning, picks, prefer
from plm_kernels.convolution import (
    LocalBlock,
    convolution,
    filters_available,
    local_block,
    pack_filters,
    taps_first,
)
from plm_kernels.eight_bit import FEW, eight_bits, linear_8bit
from plm_kernels.gates import GATES, Gate, gated
from plm_kernels.global_attention import global_attention
from plm_kernels.invariance import batch_invariant, is_batch_invariant
from plm_kernels.linear import ACTIVATIONS, Activation, linear, pack_rounded, pack_weight, packing_available
from plm_kernels.matmul import product
from plm_kernels.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from plm_kernels.packed_attention import attention, attention_backends, attention_choice, runs
from plm_kernels.parts import attention_part, merge_parts, padded_keys
from plm_kernels.reference import RelativeBias, attention_weights
from plm_kernels.rotary import Turns, rotary_half, rotary_pairs, rotate_half_, rotate_pairs_
from plm_kernels.triangle_attention import triangle_attention
from plm_kernels.triangle_multiplication import add_gated, empty_sides, pair_norm, triangle_norm, write_sides

__all__ = [
    "ACTIVATIONS",
    "FEW",
    "GATES",
    "Activation",
    "Backend",
    "Gate",
    "KernelWarning",
    "LocalBlock",
    "RelativeBias",
    "Turns",
    "add_gated",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_backends",
    "attention_choice",
    "attention_part",
    "attention_weights",
    "batch_invariant",
    "convolution",
    "eight_bits",
    "empty_sides",
    "filters_available",
    "gated",
    "global_attention",
    "is_batch_invariant",
    "layer_norm",
    "linear",
    "linear_8bit",
    "local_block",
    "merge_parts",
    "pack_filters",
    "pack_rounded",
    "pack_weight",
    "packing_available",
    "padded_keys",
    "pair_norm",
    "picks",
    "prefer",
    "product",
    "rms_norm",
    "rotary_half",
    "rotary_pairs",
    "rotate_half_",
    "rotate_pairs_",
    "runs",
    "taps_first",
    "triangle_attention",
    "triangle_norm",
    "write_sides",
]
