"""Load models, prompts and pictures, and prepare the files that results are written to.

Every mistake is found before the weights are read, and gets one sentence with its own reason. torch and transformers are
imported inside functions, so that a mistake that needs neither is answered at once.

    source.py        a name -> a folder or a repository on the hub
    config.py        the config, and the JSON files beside it
    weights.py       the files of the weights, and the model in them
    processor.py     the processor
    models.py        all of these together: `load_model`, `open_model`, `load_decoder`
    placement.py     the device on which a loaded model takes its inputs
    prompts.py       a question -> the whole prompt -> the inputs of a model
    pictures.py      a file -> an RGB picture
    videos.py        a file, or a folder of pictures -> frames of a video
    frames.py        frames -> the inputs of a model, without torchvision
    shown.py         what one question is about: a picture, a video, or both
    questions.py     model, picture or video and question together, and the picture as the model saw it
    recipes.py       a string, file or folder -> a recipe
    datasets.py      a folder with a Hugging Face dataset -> its rows
    dataset_hub.py   whether a dataset of the hub can be had
    outputs.py       folders, figures and packages, checked before anything is computed
    environment.py   versions and devices; transformers without bars and warnings
"""
