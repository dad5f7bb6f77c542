"""What `trainer` of a run may hold: more arguments for trl's configuration. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypedDict

from dlora.edge.task_forms import Task
from dlora.errors import UsageError

__all__ = ["TrainerTexts", "check_trainer"]

# Fixed because the split, or going on after an ending, needs it.
_RESERVED: Final = frozenset(
    "output_dir fp16 bf16 gradient_checkpointing packing padding_free push_to_hub "
    "remove_unused_columns resume_from_checkpoint completion_only_loss assistant_only_loss "
    "dataloader_num_workers restore_callback_states_from_checkpoint".split()
)
_RESERVED_BY_TASK: Final[dict[Task, frozenset[str]]] = {
    "sft": frozenset(),
    **dict.fromkeys(
        ("dpo", "kto", "grpo"),
        frozenset(
            "model_init_kwargs precompute_ref_log_probs precompute_ref_batch_size sync_ref_model "
            "ref_model_mixup_alpha ref_model_sync_steps truncation_mode activation_offloading "
            "use_liger_kernel cast_lm_head_to_fp32 use_vllm use_transformers_continuous_batching "
            "transformers_continuous_batching_config use_transformers_paged cache_implementation "
            "max_tool_calling_iterations ds3_gather_for_generation log_completions "
            "log_completions_hub_repo log_multimodal log_unique_prompts num_completions_to_print "
            "dataset_num_proc trust_remote_code metric_for_best_model greater_is_better".split()
        ),
    ),
}
"""The same of one task: other models than the adapter and its copy, weights that would have to be
here, texts in a log."""
_SETTINGS: Final = {
    name: name
    for name in (
        "learning_rate optim lr_scheduler_type warmup_steps weight_decay max_grad_norm max_steps "
        "gradient_accumulation_steps max_length seed eval_steps save_steps save_total_limit "
        "logging_steps report_to"
    ).split()
} | {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "pad_to_multiple_of": "pad_to",
    "load_best_model_at_end": "keep_best",
    "use_cpu": "device",
}
"""Arguments that are settings of a run -> the setting."""


class TrainerTexts(TypedDict, total=False):
    """Arguments that are text, whatever the text looks like."""

    optim_args: str | None
    optim_target_modules: list[str] | str | None
    torch_compile_backend: str | None
    torch_compile_mode: str | None
    logging_strategy: str
    log_level: str
    log_level_replica: str
    run_name: str | None
    project: str
    trackio_space_id: str | None
    trackio_bucket_id: str | None
    trackio_static_space_id: str | Literal[False] | None
    eval_strategy: str
    include_for_metrics: list[str]
    save_strategy: str
    metric_for_best_model: str | None
    hub_token: str | None
    hub_model_id: str | None
    hub_strategy: str
    hub_revision: str | None
    dataloader_multiprocessing_context: str | None
    label_names: list[str] | None
    train_sampling_strategy: str
    length_column_name: str
    ddp_backend: str | None
    fsdp: str | None
    debug: list[str] | str
    chat_template_path: str | None
    dataset_text_field: str
    eos_token: str | None
    truncation_mode: str
    packing_strategy: str
    loss_type: list[str] | str
    pad_token: str | None

    # Of dpo and grpo alone.
    f_divergence_type: str
    importance_sampling_level: str
    multi_objective_aggregation: str
    scale_rewards: str


def check_trainer(arguments: Mapping[str, Any], task: Task = "sft") -> None:
    """Raises UsageError for arguments that are fixed, or that are settings of their own.

    Of two values for one thing one would count for nothing, and only settings are checked.
    """
    reserved = sorted((_RESERVED | _RESERVED_BY_TASK[task]) & arguments.keys())
    reserved += sorted(name for name in arguments if name.startswith("vllm_"))
    if reserved:
        raise UsageError(f"trainer: {', '.join(reserved)} cannot be set here")
    if twice := sorted(_SETTINGS.keys() & arguments.keys()):
        name = twice[0]
        raise UsageError(f"trainer: {name} is a setting of its own: give {_SETTINGS[name]} instead")
