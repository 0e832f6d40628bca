"""Reconstruction quality, by the published evaluation protocol.

`moss-tok evaluate` writes what OpenMOSS/MOSS-Audio-Tokenizer-Eval writes, so that its summary reads
our results, and its metrics that need downloaded models can be run on our files:

  OUTPUT/MODEL/rvqN/results.json                    {DATASET: {metric: mean}, "_meta": {"bps": n}}
  OUTPUT/MODEL/rvqN/DATASET/manifest.json
  OUTPUT/MODEL/rvqN/DATASET/{gt_audios,syn_audios}/000000_STEM.flac

and additional files, from which a run resumes and reports are made:

  OUTPUT/MODEL/rvqN/DATASET/scores.jsonl            a line per file
  OUTPUT/MODEL/rvqN/DATASET/texts.jsonl             transcripts by the language model
  OUTPUT/MODEL/codes/DATASET/000000_STEM.npz        the codes, as `moss-tok encode` writes them
  OUTPUT/MODEL/entropy.json                         {DATASET: bits that each quantizer uses}
  OUTPUT/{summary.csv,summary.md,report.html}       all results
"""
