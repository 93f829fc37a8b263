"""SuS: support sets from class names alone, with the user's own images (LC) or with generated ones (SD).

    prompts = support.photo(classes)                                  # or cupl, or combined
    images = support.retrieve(model, preprocess, tokenizer, prompts, "photos/")
    images.save("set/")
    loaded = support.SupportSet.load("set/", model)                   # refuses any other tower
    head = ck.TipX(support.class_embeddings(model, tokenizer, prompts), loaded.features, loaded.labels)

Source: SuS-X, arXiv 2211.16198, section 3.1.
"""

from clipkernels.support.collection import retrieve
from clipkernels.support.diffusion import generate, load_pipeline
from clipkernels.support.prompts import ENSEMBLE, PHOTO, QUESTIONS, Prompts, class_embeddings, combined, cupl, photo
from clipkernels.support.store import Picture, SupportSet, refresh

__all__ = [
    "ENSEMBLE",
    "PHOTO",
    "Picture",
    "Prompts",
    "QUESTIONS",
    "SupportSet",
    "class_embeddings",
    "combined",
    "cupl",
    "generate",
    "load_pipeline",
    "photo",
    "refresh",
    "retrieve",
]
