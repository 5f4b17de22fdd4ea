"""How like real pictures the drawn ones are: python -m tinyldm.metrics. See docs/metrics.md.

    resize.py            pictures -> the input of the Inception network, as the known programs do
    features.py          a folder of pictures -> one row of features per picture
    fid.py               Fréchet distance, and files of means and covariances
    kid.py  cmmd.py      distances of two sets by a kernel
    precision_recall.py  how many of one set lie among the other
    clip_score.py        how well pictures match their texts
    inception_score.py   from the logits of one set alone
    command.py           the command line

Every distance takes arrays of features (N,F), so other features work as well.
"""
