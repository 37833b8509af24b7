"""Streams, one file each: embedded and prepared sequences of tasks, with the model that they are meant for.

A stream is a class with a `Config` of options; `build(seed)` gives a `Prepared`: the stream, a frozen base and the
names of the layers to adapt. `build(seed, validation=True)` takes a fifth of the training set as the test set: the one
to choose hyper-parameters on. `base` has what they share.

    name             scenario  tasks  classes  network
    digits5          class     5      10       GlyphNet pre-trained on drawn strokes
    glyph1d          class     5-20   40       GlyphNet pre-trained on other 1-D signals
    glyph1d_domain   domain    6      10       the same
    glyph1d_blurry   free      parts  40       the same
    text             class     2      4        random tiny BERT: the text path, no evidence
    records          any       any    any      any model of `models.load` on any labelled data of `data.source`
    wordnet          class     10     35       upper half of MiniLM      (fedpeft data prepare wordnet, minilm)
    glyphs           class     12     36       ViT pre-trained on text fonts  (fedpeft data prepare glyphs)
"""
