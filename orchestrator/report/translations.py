"""The report's own words in Japanese; English is the key.  What a planner or a library says stays as it said it."""

from __future__ import annotations

from collections.abc import Callable

LANGUAGES = ("en", "ja")

JAPANESE = {
    "Run report": "実行レポート",
    "Search report": "探索レポート",
    "What was asked": "依頼内容",
    "What was chosen, and why": "選ばれた設定とその理由",
    "Result": "結果",
    "Quality": "品質",
    "Training": "学習の経過",
    "Memory": "メモリ",
    "Time of a step": "1ステップの時間",
    "Machines": "マシン",
    "Faults and recoveries": "障害と復旧",
    "Sample outputs": "出力例",
    "Cost": "コスト",
    "Reproduce": "再現方法",
    "Trials": "試行",
    "Recommendation": "推奨",
    "Before the trials": "試行前の予測",
    "state": "状態",
    "steps": "ステップ",
    "tokens": "トークン",
    "training time": "学習時間",
    "tokens/s": "トークン/秒",
    "peak memory": "最大メモリ",
    "cost": "コスト",
    "model": "モデル",
    "data": "データ",
    "method": "手法",
    "goal": "目的",
    "setting": "設定",
    "value": "値",
    "why": "理由",
    "as the job says": "ジョブの指定どおり",
    "measured": "実測",
    "predicted": "予測",
    "before": "調整前",
    "after": "調整後",
    "wanted": "正解",
    "prompt": "入力",
    "step": "ステップ",
    "loss": "損失",
    "held-out loss": "評価損失",
    "training loss": "学習損失",
    "seconds": "秒",
    "minutes": "分",
    "GiB": "GiB",
    "share": "割合",
    "node": "ノード",
    "device": "デバイス",
    "computes": "計算",
    "waits": "待ち",
    "sent a step": "送信/ステップ",
    "when": "時刻",
    "what happened": "内容",
    "weights": "重み",
    "gradients": "勾配",
    "optimizer": "オプティマイザ",
    "activations": "アクティベーション",
    "logits": "ロジット",
    "buffers": "バッファ",
    "framework": "フレームワーク",
    "compute": "計算",
    "memory": "メモリ",
    "overhead": "オーバーヘッド",
    "update": "更新",
    "transfer": "転送",
    "sync": "同期",
    "way": "方法",
    "time": "時間",
    "energy": "電力量",
    "a run": "1回",
    "1M tokens": "100万トークン",
    "a year": "年間",
    "purchase": "購入費",
    "note": "備考",
    "this run": "この実行",
    "this job": "このジョブ",
    "not priced": "価格未設定",
    "set": "設定するキー",
    "declared": "申告値",
    "a quality point": "品質1ポイント",
    "of failed trials": "失敗した試行",
    "of steps trained again": "やり直したステップ",
    "combination": "組み合わせ",
    "trial": "試行",
    "whole job": "ジョブ全体",
    "recommended": "推奨",
    "on the front": "パレート最適",
    "other trials": "その他の試行",
    "stopped early": "早期終了",
    "failed": "失敗",
    "reason": "理由",
    "combinations": "組み合わせ",
    "cannot run": "実行不可",
    "cannot win": "勝ち目なし",
    "worth a trial": "試す価値あり",
    "tried": "試行済み",
    "version": "バージョン",
    "What the figures show": "図の見方",
    "The loss of every step; dots are the held-out loss.": "各ステップの損失。点は評価データでの損失。",
    "Held-out rows before and after training.": "学習前後の評価データでの結果。",
    "Bytes at the peak of a step by part, as predicted; the line is what was measured.": (
        "1ステップの最大時に占める内訳(予測)。縦線は実測値。"
    ),
    "Seconds of a step by what is waited for, as predicted; the line is what was measured.": (
        "1ステップの待ち時間の内訳(予測)。縦線は実測値。"
    ),
    "What each machine does of a step, in seconds.": "各マシンの1ステップの内訳(秒)。",
    "Each trial scaled to the whole job; the dashed line joins those that nothing beats in time and memory.": (
        "各試行をジョブ全体に換算。破線は時間とメモリで他に劣らない試行を結ぶ。"
    ),
    "Each trial scaled to the whole job: time and the quality it reached.": (
        "各試行をジョブ全体に換算。時間と到達した品質。"
    ),
    "Seconds of a step, predicted and measured; on the dashed line they are equal.": (
        "1ステップの秒数の予測と実測。破線上で一致。"
    ),
    "Held-out loss of each trial while it trained.": "各試行の評価損失の推移。",
    "No fault happened.": "障害はありませんでした。",
    "Prices are the job's own; unknown ones stay unknown.": "価格はジョブで指定された値です。不明な値は推測しません。",
    "Measured energy comes from hardware counters, declared from stated watts.": (
        "電力量の実測はハードウェアの計数器、申告値は指定されたワット数によります。"
    ),
    "The same data, plan and versions give the same numbers on the same machine.": (
        "同じデータ・計画・バージョンなら、同じマシンで同じ数値になります。"
    ),
}


def words(lang: str) -> Callable[[str], str]:
    """A translator into `lang`.  Raises KeyError for a sentence of ours that has no translation."""
    return (lambda text: JAPANESE[text]) if lang == "ja" else (lambda text: text)
