"""The student: a timm ViT that sees few patches, a decoder that predicts a feature for every token, and their loss.

Shape suffixes of tensor names, one letter per dimension:

    B  images                          C  image channels
    L  patches, raster order           H  image height in pixels
    S  tokens: CLS first, then patches W  image width in pixels
    V  visible patches                 P  values of one patch's pixels
    M  masked patches, M = L - V       D  width of the tokens, of the encoder or of the decoder
    N  attention heads                 K  width of one head
    T  width of the predicted feature
"""
