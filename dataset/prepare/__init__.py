"""Converters from official downloads, as they lie on the disk once unpacked, to annotation files.

`python -m simla.dataset.prepare` lists them. Each is a module here with

    prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None
    add_options(parser: argparse.ArgumentParser) -> None        where it has flags of its own
    ROOT: str                                       help for --root, where it can be left out

or, where it makes a single file, main(arguments: list[str]). Its docstring says what it needs, what it writes
and by which rules; it is what `--help` shows.
"""

CONVERTERS = {  # name -> (module of this package, what it makes)
    "coco": ("coco", "COCO captions: Karpathy's split for retrieval, and pre-training pairs"),
    "flickr30k": ("flickr30k", "Flickr30k: Karpathy's split for retrieval"),
    "flickr8k": ("flickr8k", "Flickr8k: retrieval by its split or Flickr30k's, and pre-training"),
    "visual_genome": ("visual_genome", "Visual Genome's region descriptions: pre-training pairs"),
    "cc3m": ("url_lists", "Conceptual Captions 3M: pre-training pairs"),
    "cc12m": ("url_lists", "Conceptual 12M: pre-training pairs"),
    "sbu": ("url_lists", "SBU Captions: pre-training pairs"),
    "img2dataset": ("img2dataset", "any folder that img2dataset has downloaded: pre-training pairs"),
    "huggingface": ("huggingface", "parquet and arrow files with the images in them: shards"),
    "table": ("table", "your own csv, tsv, txt, jsonl or parquet file: pre-training or retrieval files"),
    "refcoco": ("refcoco", "RefCOCO: grounding"),
    "refcoco+": ("refcoco", "RefCOCO+: grounding"),
    "refcocog": ("refcoco", "RefCOCOg: grounding"),
    "vqa": ("vqa", "VQA v2 and Visual Genome's questions"),
    "answers": ("answers", "the list of answers that VQA ranks, from annotation files"),
    "vocabulary": ("vocabulary", "a WordPiece vocabulary of annotation files' texts, in any language"),
    "nlvr2": ("nlvr2", "NLVR2"),
    "snli_ve": ("snli_ve", "SNLI-VE"),
    "shards": ("shards", "WebDataset shards of an annotation file and its images"),
}
