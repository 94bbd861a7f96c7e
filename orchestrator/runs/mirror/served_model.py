"""What `mlflow models serve` runs: a run's adapter on its base model, or its whole model.  Stands alone.

MLflow copies this file into the model that it keeps; nothing else of this project is there.
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false
from typing import Any

import mlflow
import pandas


class TunedModel(mlflow.pyfunc.PythonModel):
    """Answers of the tuned model, greedy, a string for each row's `prompt`."""

    def load_context(self, context: Any) -> None:
        """Load base, adapter and tokenizer from where the run left them."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder, config = context.artifacts["export"], context.model_config
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(config["base"] or folder, dtype=config["dtype"])
        if config["base"]:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, folder)
        self.model: Any = model.eval()

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """One answer a row, one row after the other."""
        most = int((params or {}).get("max_new_tokens", 256))
        return [self._answer(str(prompt), most) for prompt in model_input["prompt"]]

    def _answer(self, prompt: str, most: int) -> str:
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=not self.tokenizer.chat_template)
        answer = self.model.generate(**ids, max_new_tokens=most, do_sample=False)
        return self.tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


mlflow.models.set_model(TunedModel())
